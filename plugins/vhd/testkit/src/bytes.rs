//! Numbers and checksums in bytes.

/// The number of four bytes at `at`.
pub fn be32(bytes: &[u8], at: usize) -> usize {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

/// The number of eight bytes at `at`.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Put a number of four bytes at `at`.
pub fn put32(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at..at + 4].copy_from_slice(&(value as u32).to_be_bytes());
}

/// Put a number of eight bytes at `at`.
pub fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// The checksum of a structure whose own field stands at `field`.
pub fn checksum(bytes: &[u8], field: usize) -> u32 {
    let all: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
    let own: u32 = bytes[field..field + 4].iter().map(|&byte| u32::from(byte)).sum();
    !(all - own)
}

/// Put the right checksum into the structure of `length` bytes at `at`, whose field is `field` bytes further on.
pub fn seal(bytes: &mut [u8], at: usize, length: usize, field: usize) {
    let sum = checksum(&bytes[at..at + length], field);
    put32(bytes, at + field, sum as usize);
}
