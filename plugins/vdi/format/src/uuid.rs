//! Identifiers of images and of their states (`RTUUID`).

use core::fmt;
use instar_guest_abi::{next_uuid, uuid_of_bits};

/// Bytes of a UUID.
pub const UUID_BYTES: usize = 16;

/// A UUID, as the bytes that stand in the file. They are only compared; as a text, the first three groups are little-endian
/// numbers (`RTUUID`'s `Gen`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; UUID_BYTES]);

impl Uuid {
    /// The one that stands for none (`RTUuidIsNull`).
    pub const NULL: Self = Self([0; UUID_BYTES]);

    /// Whether this stands for none.
    #[must_use]
    pub fn is_null(&self) -> bool {
        *self == Self::NULL
    }

    /// A UUID of version 4 made of these 128 bits, six of which are replaced.
    #[must_use]
    pub fn of_bits(low: u64, high: u64) -> Self {
        Self(uuid_of_bits(low, high))
    }

    /// What `uuidModify` becomes when something is written from an image with the identity `child`, which is empty if it has
    /// none. VirtualBox draws one (`vdResetModifiedFlag` in `VD.cpp`); here [it follows](next_uuid).
    #[must_use]
    pub fn next(&self, child: &[u8]) -> Self {
        Self(next_uuid(&self.0, child))
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
    use alloc::string::ToString;

    #[test]
    fn the_text_has_its_first_groups_turned_round() {
        let uuid = Uuid(core::array::from_fn(|index| u8::try_from(index).unwrap_or(0)));
        assert_eq!(uuid.to_string(), "03020100-0504-0706-0809-0a0b0c0d0e0f");
        assert!(Uuid::NULL.is_null() && !uuid.is_null());
    }

    #[test]
    fn a_state_that_follows_is_one_of_version_4() {
        let uuid = Uuid([0x55; UUID_BYTES]).next(&[7; 32]);
        let text = uuid.to_string();
        assert_eq!((&text[14..15], text[19..20].contains(['8', '9', 'a', 'b'])), ("4", true), "{text}");
        assert_ne!(uuid, Uuid([0x55; UUID_BYTES]).next(&[8; 32]));
    }
}
