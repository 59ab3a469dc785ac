//! Identifiers of images and of their states (`RTUUID`).

use core::fmt;

/// Bytes of a UUID.
pub const UUID_BYTES: usize = 16;

/// A UUID, as the bytes that stand in the file. They are only compared; as a text, the first three groups are little-endian
/// numbers (`RTUUID`'s `Gen`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; UUID_BYTES]);

/// The finalizer of splitmix64: a bijection that spreads each bit over all of them.
const fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

impl Uuid {
    /// The one that stands for none (`RTUuidIsNull`).
    pub const NULL: Self = Self([0; UUID_BYTES]);

    /// Whether this stands for none.
    #[must_use]
    pub fn is_null(&self) -> bool {
        *self == Self::NULL
    }

    /// A UUID of version 4 made of these 128 bits, six of which are replaced (RFC 9562, 5.4).
    #[must_use]
    pub fn of_bits(low: u64, high: u64) -> Self {
        let mut bytes = [0; UUID_BYTES];
        bytes[..8].copy_from_slice(&low.to_le_bytes());
        bytes[8..].copy_from_slice(&high.to_le_bytes());
        // The version is the highest digit of a little-endian number of 16 bits.
        bytes[7] = bytes[7] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Self(bytes)
    }

    /// What `uuidModify` becomes when something is written from an image with the identity `child`, which is empty if it has
    /// none. VirtualBox draws one (`vdResetModifiedFlag` in `VD.cpp`); here it follows from the one before and the child, so
    /// that a commit that was interrupted finds the same one when it is run again, and no other child comes to it.
    #[must_use]
    pub fn next(&self, child: &[u8]) -> Self {
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte));
        let salt = child.chunks(8).fold(0x9e37_79b9_7f4a_7c15, |salt, bytes| mix(salt ^ number(bytes)));
        let half = |at: usize| self.0[at..at + 8].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte));
        let low = mix(half(0).wrapping_add(salt) ^ half(8).rotate_left(17));
        let high = mix(half(8).wrapping_add(low));
        Self::of_bits(low, high)
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, index) in [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15].into_iter().enumerate() {
            if matches!(place, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0[index])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use alloc::string::ToString;

    #[test]
    fn the_text_has_its_first_groups_turned_round() {
        let uuid = Uuid(core::array::from_fn(|index| u8::try_from(index).unwrap_or(0)));
        assert_eq!(uuid.to_string(), "03020100-0504-0706-0809-0a0b0c0d0e0f");
        assert!(Uuid::NULL.is_null() && !uuid.is_null());
    }

    #[test]
    fn each_state_is_followed_by_another_one() {
        let mut seen = BTreeSet::new();
        let mut uuid = Uuid([0x55; UUID_BYTES]);
        for _ in 0..1000 {
            assert!(seen.insert(uuid.0), "a state comes back");
            uuid = uuid.next(&[]);
            let text = uuid.to_string();
            assert_eq!((&text[14..15], text[19..20].contains(['8', '9', 'a', 'b'])), ("4", true), "{text}");
        }
        let one = Uuid([0x55; UUID_BYTES]);
        assert_eq!(one.next(&[7; 32]), one.next(&[7; 32]));
        // Each bit of the child counts, and what it is after, too.
        let child = |bit: u32| if bit < 128 { [1u128 << bit, 0] } else { [0, 1 << (bit - 128)] };
        let children = (0..256).map(child).map(|[low, high]| [low.to_le_bytes(), high.to_le_bytes()].concat());
        let all: BTreeSet<[u8; UUID_BYTES]> =
            children.map(|child| one.next(&child).0).chain([one.next(&[]).0]).collect();
        assert_eq!(all.len(), 257);
        let neighbor = Uuid([[0x54].as_slice(), &[0x55; 15]].concat().try_into().unwrap_or_default());
        assert_ne!(neighbor.next(&[]), one.next(&[]));
    }
}
