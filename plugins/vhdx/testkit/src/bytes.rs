//! Numbers and checksums in bytes.

/// A number of `N` bytes at `at`; what is past the end is zero.
fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

/// The number of two bytes at `at`.
pub fn le16(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes(number(bytes, at)))
}

/// The number of four bytes at `at`.
pub fn le32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(number(bytes, at)) as usize
}

/// The number of eight bytes at `at`.
pub fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(number(bytes, at))
}

/// Put a number of two bytes at `at`.
pub fn put16(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
}

/// Put a number of four bytes at `at`.
pub fn put32(bytes: &mut [u8], at: usize, value: usize) {
    bytes[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
}

/// Put a number of eight bytes at `at`.
pub fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// CRC-32C of a structure whose own field, at 4, counts as zero.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let without = crc32c::crc32c_append(crc32c::crc32c(&bytes[..4]), &[0; 4]);
    crc32c::crc32c_append(without, &bytes[8..])
}

/// Put the right checksum into the structure of `length` bytes at `at`.
pub fn seal(bytes: &mut [u8], at: usize, length: usize) {
    let sum = crc32c(&bytes[at..at + length]);
    put32(bytes, at + 4, sum as usize);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_comes_out() {
        // RFC 3720, B.4: 32 bytes of zero.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }
}
