//! A hash that is the same on every machine and with every compiler. The build script uses it, too.

/// Initial value of a hash (FNV-1a, 64 bits: `draft-eastlake-fnv`, "Offset Basis").
pub const START: u64 = 0xcbf2_9ce4_8422_2325;

/// Update `hash` with these bytes.
#[must_use]
pub fn take_in(hash: u64, bytes: &[u8]) -> u64 {
    const PRIME: u64 = 0x0100_0000_01b3;
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME))
}
