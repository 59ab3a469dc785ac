//! The parent locator: which image is the parent, and where it may be (2.6.2.6).

use crate::{u16_at, u32_at, FormatError, Guid};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// The keys of a locator of the type that is known (2.6.2.6.3).
pub mod keys {
    /// The parent's DataWriteGuid.
    pub const LINKAGE: &str = "parent_linkage";
    /// The one that the parent is about to have, or had before.
    pub const LINKAGE2: &str = "parent_linkage2";
    /// The parent's path, from the directory of the image.
    pub const RELATIVE: &str = "relative_path";
    /// The parent's path, with the GUID of its volume.
    pub const VOLUME: &str = "volume_path";
    /// The parent's path, with its drive or its share.
    pub const ABSOLUTE: &str = "absolute_win32_path";
}

const TYPE: Guid = Guid::of(0xb04a_efb7, 0xd19e, 0x4a81, [0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13]);
const HEADER_BYTES: usize = 20;
const ENTRY_BYTES: usize = 12;
const KNOWN: [&str; 5] = [keys::LINKAGE, keys::LINKAGE2, keys::RELATIVE, keys::VOLUME, keys::ABSOLUTE];

/// Most bytes of a path: it has to stand in one metadata item with the linkages.
const LONGEST_PATH: usize = 32_000;

/// What an image records of its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Its DataWriteGuid.
    pub data_write: Guid,
    /// Its path, relative to the image or absolute, with slashes.
    pub path: String,
}

/// A value: its text, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Byte offset within the item.
    pub offset: u32,
    /// Bytes.
    pub length: u16,
    /// The units of UTF-16.
    pub units: Vec<u16>,
}

impl Text {
    /// As text; `None` if it is none, is empty, or holds a NUL.
    #[must_use]
    pub fn text(&self) -> Option<String> {
        String::from_utf16(&self.units).ok().filter(|text| !text.is_empty() && !text.contains('\0'))
    }
}

/// What a locator says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locator {
    /// The values of the known keys, in the order of [`keys`].
    values: [Option<Text>; KNOWN.len()],
    /// The parent's identity.
    pub linkage: Guid,
    /// Another one that it may have; `None` without the key, or if it is null.
    pub linkage2: Option<Guid>,
}

impl Locator {
    /// Take a locator apart; `offset` is its byte in the file, for errors.
    ///
    /// # Errors
    /// For a type that is not known, a parent that nothing identifies, keys that stand there twice, and places outside of it.
    pub fn parse(item: &[u8], offset: u64) -> Result<Self, FormatError> {
        let corrupt = |text: String| FormatError::corrupt(offset, text);
        let kind = Guid::at(item, 0);
        if item.len() < HEADER_BYTES {
            return Err(corrupt(format!("the parent locator has {} bytes, fewer than its header", item.len())));
        }
        if kind != TYPE {
            let text = format!("the parent locator is of the type {kind}: a parent that is no VHDX is not known");
            return Err(FormatError::unsupported(offset, text));
        }
        let mut values = [const { None }; KNOWN.len()];
        for index in 0..usize::from(u16_at(item, 18)) {
            let at = HEADER_BYTES + index * ENTRY_BYTES;
            let part = |place: u32, length: u16| {
                let start = usize::try_from(place).ok()?;
                item.get(start..start.checked_add(length.into())?).filter(|_| at + ENTRY_BYTES <= item.len())
            };
            let (key, value) = (u32_at(item, at), u32_at(item, at + 4));
            let (key_length, length) = (u16_at(item, at + 8), u16_at(item, at + 10));
            let (Some(key), Some(bytes)) = (part(key, key_length), part(value, length)) else {
                return Err(corrupt(format!("entry {index} of the parent locator does not lie in it")));
            };
            let is_key = |known: &str| known.encode_utf16().flat_map(u16::to_le_bytes).eq(key.iter().copied());
            let Some(known) = KNOWN.iter().position(|known| is_key(known)) else { continue };
            let place = &mut values[known];
            if place.is_some() {
                return Err(corrupt(format!("the parent locator has the key {} twice", KNOWN[known])));
            }
            let units = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
            *place = Some(Text { offset: value, length, units });
        }
        let guid = |index: usize| {
            let Some(text) = values[index].as_ref() else { return Ok(None) };
            let guid = Guid::parse(text.units.iter().copied());
            guid.map(Some).ok_or_else(|| corrupt(format!("{} of the parent locator is no GUID", KNOWN[index])))
        };
        let linkage = guid(0)?.ok_or_else(|| corrupt(format!("the parent locator has no {}", keys::LINKAGE)))?;
        if linkage.is_null() {
            // Zeroes are no image's (2.6.2.6.3 has them for a `parent_linkage2` that says nothing).
            return Err(corrupt(format!("{} of the parent locator is zero, which no parent has", keys::LINKAGE)));
        }
        let linkage2 = guid(1)?.filter(|guid| !guid.is_null());
        Ok(Self { values, linkage, linkage2 })
    }

    /// The value of a known key.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&Text> {
        let index = KNOWN.iter().position(|known| *known == key)?;
        self.values[index].as_ref()
    }

    /// The bytes of a locator that names this parent. Both linkages come first, so that they lie in one page whatever the path.
    ///
    /// # Errors
    /// For a name that cannot stand in a VHDX.
    pub fn of_parent(parent: &Parent) -> Result<Vec<u8>, FormatError> {
        let path = parent.path.as_str();
        let base = path.rsplit('/').next().unwrap_or(path);
        if base.is_empty() || path.contains(['\\', '\0']) || path.len() > LONGEST_PATH {
            let text = format!("the name '{}' cannot stand in a VHDX", path.escape_default());
            return Err(FormatError::unsupported(0, text));
        }
        if parent.data_write.is_null() {
            let text = "the DataWriteGuid of the parent is zero, which is no image's: write to the parent once";
            return Err(FormatError::unsupported(0, text));
        }
        let windows = path.replace('/', "\\");
        let (key, path) = if path.starts_with('/') {
            (keys::ABSOLUTE, windows)
        } else {
            (keys::RELATIVE, format!(".\\{}", windows.strip_prefix(".\\").unwrap_or(&windows)))
        };
        let linkage = |guid: Guid| format!("{{{guid}}}");
        Self::encode(&[(keys::LINKAGE, linkage(parent.data_write)), (keys::LINKAGE2, linkage(Guid::NULL)), (key, path)])
    }

    /// The bytes of a locator with these keys and values.
    ///
    /// # Errors
    /// If a value is longer than its length can say.
    pub fn encode(pairs: &[(&str, String)]) -> Result<Vec<u8>, FormatError> {
        let mut item = vec![0; HEADER_BYTES + pairs.len() * ENTRY_BYTES];
        crate::put(&mut item, 0, &TYPE.0);
        crate::put(&mut item, 18, &u16::try_from(pairs.len()).unwrap_or(u16::MAX).to_le_bytes());
        for (index, (key, value)) in pairs.iter().enumerate() {
            let at = HEADER_BYTES + index * ENTRY_BYTES;
            for (number, text) in [key, value.as_str()].into_iter().enumerate() {
                let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                let length = u16::try_from(bytes.len());
                let length =
                    length.map_err(|_| FormatError::unsupported(0, format!("{key} is too long for a VHDX")))?;
                // A GUID is to stand within one sector, so that a write of it is not torn.
                let straddles = item.len() / 512 != (item.len() + bytes.len().saturating_sub(1)) / 512;
                if bytes.len() == crate::GUID_TEXT_BYTES && straddles {
                    item.resize(item.len().next_multiple_of(512), 0);
                }
                let place = u32::try_from(item.len()).unwrap_or(u32::MAX);
                crate::put(&mut item, at + number * 4, &place.to_le_bytes());
                crate::put(&mut item, at + 8 + number * 2, &length.to_le_bytes());
                item.extend(bytes);
            }
        }
        Ok(item)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    fn pairs(linkage: &str) -> Vec<(&'static str, String)> {
        let null = format!("{{{}}}", Guid::NULL);
        vec![
            (keys::LINKAGE, linkage.to_string()),
            (keys::RELATIVE, r".\base.vhdx".to_string()),
            ("something_else", "x".to_string()),
            (keys::LINKAGE2, null),
        ]
    }

    const ID: &str = "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}";

    #[test]
    fn zeroes_are_the_identity_of_no_parent() {
        let item = Locator::encode(&pairs(&format!("{{{}}}", Guid::NULL))).unwrap();
        assert!(Locator::parse(&item, 0).unwrap_err().text.contains("zero, which no parent has"));
    }

    #[test]
    fn what_is_made_is_read() {
        let item = Locator::encode(&pairs(ID)).unwrap();
        let locator = Locator::parse(&item, 0).unwrap();
        assert_eq!(locator.linkage.to_string(), ID[1..37]);
        assert_eq!(locator.linkage2, None);
        assert_eq!(locator.value(keys::RELATIVE).unwrap().text().as_deref(), Some(r".\base.vhdx"));
        assert!(locator.value(keys::VOLUME).is_none() && locator.value("something_else").is_none());
        for key in [keys::LINKAGE, keys::LINKAGE2] {
            let value = locator.value(key).unwrap();
            assert_eq!(value.offset / 512, (value.offset + 75) / 512, "{key}");
        }
        let other = Locator::encode(&[(keys::LINKAGE, ID.to_uppercase()), (keys::LINKAGE2, ID.to_string())]).unwrap();
        let other = Locator::parse(&other, 0).unwrap();
        assert_eq!((other.linkage, other.linkage2), (locator.linkage, Some(locator.linkage)));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused = |item: &[u8]| Locator::parse(item, 7).unwrap_err();
        let item = Locator::encode(&pairs(ID)).unwrap();
        assert!(refused(&item[..19]).text.contains("fewer than its header"));
        let mut other = item.clone();
        other[0] ^= 1;
        assert_eq!(refused(&other).trouble, crate::Trouble::Unsupported);
        for at in [HEADER_BYTES, HEADER_BYTES + 4] {
            let mut outside = item.clone();
            crate::put(&mut outside, at, &u32::MAX.to_le_bytes());
            assert!(refused(&outside).text.contains("entry 0"));
        }
        let mut many = item.clone();
        crate::put(&mut many, 18, &u16::MAX.to_le_bytes());
        assert!(refused(&many).text.contains("does not lie in it") || refused(&many).text.contains("twice"));
        assert!(refused(&Locator::encode(&pairs("{x}")).unwrap()).text.contains("is no GUID"));
        assert!(refused(&Locator::encode(&pairs(ID)[1..]).unwrap()).text.contains("has no parent_linkage"));
        let twice = [pairs(ID), pairs(ID)].concat();
        assert!(refused(&Locator::encode(&twice).unwrap()).text.contains("twice"));
        assert!(Locator::encode(&[(keys::RELATIVE, "x".repeat(40_000))]).is_err());
    }
}
