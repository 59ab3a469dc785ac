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

#[cfg(test)]
mod tests {
    extern crate alloc;

    use super::*;
    use alloc::collections::BTreeSet;

    /// Images that were committed into record what an earlier release came to.
    #[test]
    fn what_follows_stays_what_it_is() {
        assert_eq!(uuid_of_bits(u64::MAX, 0), [255, 255, 255, 255, 255, 255, 255, 0x4f, 0x80, 0, 0, 0, 0, 0, 0, 0]);
        let uuid = [0x55; 16];
        assert_eq!(next_uuid(&uuid, &[]), [244, 62, 10, 198, 216, 252, 145, 65, 135, 88, 164, 8, 198, 90, 253, 92]);
        assert_eq!(next_uuid(&uuid, &[7; 20]), [246, 123, 229, 56, 103, 217, 212, 70, 128, 57, 23, 26, 79, 91, 19, 35]);
        assert_eq!(derived_uuid(&uuid, 1), [23, 76, 70, 132, 222, 83, 62, 76, 168, 211, 197, 11, 169, 89, 199, 62]);
    }

    #[test]
    fn each_state_is_followed_by_another_one() {
        let mut seen = BTreeSet::new();
        let mut uuid = [0x55; 16];
        for _ in 0..1000 {
            assert!(seen.insert(uuid), "a state comes back");
            assert!(seen.insert(derived_uuid(&uuid, 1)) && seen.insert(derived_uuid(&uuid, 2)));
            uuid = next_uuid(&uuid, &[]);
            assert_eq!((uuid[7] >> 4, uuid[8] >> 6), (4, 2), "{uuid:02x?}");
        }
    }

    #[test]
    fn each_bit_counts() {
        let bits = || (0..256).map(|bit| if bit < 128 { [1_u128 << bit, 0] } else { [0, 1 << (bit - 128)] });
        let children = bits().map(|[low, high]| [low.to_le_bytes(), high.to_le_bytes()]);
        let all: BTreeSet<[u8; 16]> = children.map(|child| next_uuid(&[0x55; 16], child.as_flattened())).collect();
        assert_eq!(all.len(), 256);
        assert!(!all.contains(&next_uuid(&[0x55; 16], &[])));
        let states = (0..128).map(|bit| (1_u128 << bit).to_le_bytes());
        assert_eq!(states.map(|state| next_uuid(&state, &[])).collect::<BTreeSet<_>>().len(), 128);
    }
}
