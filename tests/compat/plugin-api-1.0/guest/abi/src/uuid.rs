//! UUIDs that follow from others.
//!
//! A format that records the state of an image by a UUID wants another one with each change, and other programs draw it. Here
//! both halves of a plugin have to come to the same, each by itself, and so has a commit that is run again after a crash: it
//! follows from what there was.

/// The finalizer of SplitMix64, a permutation of the numbers of 64 bits that spreads each bit over all of them.
const fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// The little-endian number in (up to) eight bytes.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// The bytes of a UUID of version 4 that is made of these 128 bits, six of which are replaced (RFC 9562, 5.4). The first three
/// groups are little-endian, as VirtualBox and Microsoft write them: the version is the highest digit of byte 7.
#[must_use]
pub fn uuid_of_bits(low: u64, high: u64) -> [u8; 16] {
    let mut bytes = (u128::from(high) << 64 | u128::from(low)).to_le_bytes();
    bytes[7] = bytes[7] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

/// A UUID that follows from `uuid`, another one for each `salt`.
#[must_use]
pub fn derived_uuid(uuid: &[u8; 16], salt: u64) -> [u8; 16] {
    let (first, second) = uuid.split_at(8);
    let (first, second) = (little_endian(first), little_endian(second));
    let low = mix(first.wrapping_add(salt) ^ second.rotate_left(17));
    uuid_of_bits(low, mix(second.wrapping_add(low)))
}

/// What the UUID of an image's state becomes when something is written from an image with the identity `child`, which is empty
/// if that has none.
///
/// It can be foretold, so that a child records it before its parent has it, and a commit that was interrupted between the two
/// finds the same one again. No other child comes to it: two copies of a parent that each got what another child held are not
/// taken for each other.
#[must_use]
pub fn next_uuid(uuid: &[u8; 16], child: &[u8]) -> [u8; 16] {
    derived_uuid(uuid, child.chunks(8).fold(0x9e37_79b9_7f4a_7c15, |salt, bytes| mix(salt ^ little_endian(bytes))))
}
