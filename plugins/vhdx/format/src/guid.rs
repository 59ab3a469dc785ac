//! Identifiers of files, of their states and of their parts.

use core::fmt;
use instar_guest_abi::{derived_uuid, next_uuid, uuid_of_bits};

/// Bytes of a GUID as a text in UTF-16 with braces (2.6.2.6.3).
pub const GUID_TEXT_BYTES: usize = 76;

/// A GUID as it stands in a file: its first three groups are little-endian.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Guid(pub [u8; 16]);

/// The order of the bytes in the text, which has a hyphen before some of them.
const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl Guid {
    /// No GUID: an empty log has it, and a parent linkage that says nothing.
    pub const NULL: Self = Self([0; 16]);

    /// A GUID by its groups.
    #[must_use]
    pub const fn of(first: u32, second: u16, third: u16, rest: [u8; 8]) -> Self {
        let ([a, b, c, d], [e, f], [g, h]) = (first.to_le_bytes(), second.to_le_bytes(), third.to_le_bytes());
        let [i, j, k, l, m, n, o, p] = rest;
        Self([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
    }

    /// The GUID at byte `at`; null past the end.
    pub(crate) fn at(bytes: &[u8], at: usize) -> Self {
        bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(Self::NULL, |bytes| Self(*bytes))
    }

    /// Whether it is none.
    #[must_use]
    pub fn is_null(&self) -> bool {
        *self == Self::NULL
    }

    /// A GUID from 128 bits, marked as one that was drawn (RFC 9562, version 4).
    #[must_use]
    pub fn of_bits(low: u64, high: u64) -> Self {
        Self(uuid_of_bits(low, high))
    }

    /// The DataWriteGuid that follows this one when something is written from an image with the identity `child`, which is
    /// empty if it has none: see [`next_uuid`].
    #[must_use]
    pub fn next(&self, child: &[u8]) -> Self {
        Self(next_uuid(&self.0, child))
    }

    /// A FileWriteGuid after this one: a guest has nothing to draw one from.
    #[must_use]
    pub fn next_file_write(&self) -> Self {
        Self(derived_uuid(&self.0, 0x2436_a885_a308_d313))
    }

    /// The LogGuid of a session with this FileWriteGuid.
    #[must_use]
    pub fn log(&self) -> Self {
        Self(derived_uuid(&self.0, 0x1319_8a2e_0370_7344))
    }

    /// A GUID in braces, from the units of UTF-16; `None` if it is none. Either case is read (2.6.2.6.3 demands one and shows
    /// the other).
    #[must_use]
    pub fn parse(units: impl Iterator<Item = u16>) -> Option<Self> {
        let mut units = units.map(|unit| u8::try_from(unit).unwrap_or(b'?'));
        let mut bytes = [0; 16];
        (units.next()? == b'{').then_some(())?;
        for (place, index) in ORDER.into_iter().enumerate() {
            if matches!(place, 4 | 6 | 8 | 10) {
                (units.next()? == b'-').then_some(())?;
            }
            let mut digit = || char::from(units.next()?).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            bytes[index] = digit()? << 4 | digit()?;
        }
        (units.next() == Some(b'}') && units.next().is_none()).then_some(Self(bytes))
    }

    /// The text in braces, in UTF-16.
    #[must_use]
    pub fn encode(&self) -> [u8; GUID_TEXT_BYTES] {
        let mut text = [0; GUID_TEXT_BYTES];
        let written = alloc::format!("{{{self}}}");
        for (place, unit) in text.chunks_exact_mut(2).zip(written.encode_utf16()) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
        text
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, index) in ORDER.into_iter().enumerate() {
            if matches!(place, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0[index])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeSet;
    use alloc::string::{String, ToString};

    fn parse(text: &str) -> Option<Guid> {
        Guid::parse(text.encode_utf16())
    }

    #[test]
    fn the_text_has_its_first_groups_turned_round() {
        let guid = Guid::of(0x2dc2_7766, 0xf623, 0x4200, [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08]);
        let text = "2dc27766-f623-4200-9d64-115e9bfd4a08";
        assert_eq!(guid.to_string(), text);
        let braces = alloc::format!("{{{text}}}");
        assert_eq!((parse(&braces), parse(&braces.to_uppercase())), (Some(guid), Some(guid)));
        let units: alloc::vec::Vec<u16> =
            guid.encode().chunks(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
        assert_eq!(String::from_utf16_lossy(&units), braces);
        for wrong in [
            text,
            "",
            "{",
            &braces[..37],
            &alloc::format!("{braces} "),
            &braces.replace('-', "_"),
            &braces.replace('7', "x"),
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn each_state_is_followed_by_another_one() {
        let mut seen = BTreeSet::new();
        let mut guid = Guid([0x55; 16]);
        for _ in 0..1000 {
            assert!(seen.insert(guid), "a state comes back");
            assert!(seen.insert(guid.next_file_write()) && seen.insert(guid.log()));
            guid = guid.next(&[]);
            assert_eq!(&guid.to_string()[14..15], "4");
        }
        assert_ne!(guid.next(&[7; 16]), guid.next(&[8; 16]));
    }
}
