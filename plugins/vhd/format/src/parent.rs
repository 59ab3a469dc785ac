//! What an image records of its parent: an identity, a name in the header, and names in locators.

use crate::locator::{codes, Locator, MAX_LOCATOR_BYTES};
use crate::{FormatError, SECTOR};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

/// A parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Its unique ID.
    pub id: [u8; 16],
    /// Its path, relative to the image or absolute, with slashes.
    pub path: String,
}

/// A name of a parent, for a locator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// The code of its locator.
    pub code: [u8; 4],
    /// The name, in the encoding that goes with the code.
    pub bytes: Vec<u8>,
}

impl Name {
    /// Bytes that it takes in the file, whole sectors.
    #[must_use]
    pub fn room(&self) -> u64 {
        (self.bytes.len() as u64).next_multiple_of(SECTOR)
    }

    /// The locator of the name once it stands at byte `offset` of the file.
    #[must_use]
    pub fn at(&self, offset: u64) -> Locator {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        // The space in bytes, as Hyper-V and XenServer have it.
        Locator { code: self.code, space: length.next_multiple_of(512), length, offset }
    }
}

impl Parent {
    /// The last component of the path.
    #[must_use]
    pub fn base_name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// The names: for Windows and, with `url`, for XenServer. A relative name is one for `W2ru`, an absolute one for `W2ku`: the
    /// other kind would need the directory of the image.
    ///
    /// # Errors
    /// For a name that cannot stand in a VHD.
    pub fn names(&self, url: bool) -> Result<Vec<Name>, FormatError> {
        let (path, base) = (self.path.as_str(), self.base_name());
        if base.is_empty() || path.contains(['\\', '\0']) || base.encode_utf16().count() > 255 {
            let text = format!("the name '{}' cannot stand in a VHD", path.escape_default());
            return Err(FormatError::unsupported(text));
        }
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let (code, windows, unix) = if path.starts_with('/') {
            (codes::W2KU, path.replace('/', "\\"), String::from(path))
        } else {
            let plain = path.strip_prefix("./").unwrap_or(path);
            // "MICROSOFT_COMPAT: relative paths must start with .\" (blktap).
            (codes::W2RU, format!(".\\{}", plain.replace('/', "\\")), format!("./{plain}"))
        };
        let mut names = vec![Name { code, bytes: utf16(&windows) }];
        if url {
            // "file://./base.vhd" of a relative one, which is blktap's own (`vhd_macx_encode_location`).
            names.push(Name { code: codes::MACX, bytes: format!("file://{}", percent(&unix)).into_bytes() });
        }
        if names.iter().any(|name| name.bytes.len() as u64 > MAX_LOCATOR_BYTES) {
            return Err(FormatError::unsupported("the name of the backing file is too long for a VHD"));
        }
        Ok(names)
    }
}

/// A path as a part of a URL (RFC 3986, 2.1).
fn percent(path: &str) -> String {
    let mut url = String::new();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            url.push(char::from(byte));
        } else {
            url.push_str(&format!("%{byte:02X}"));
        }
    }
    url
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn names(path: &str, url: bool) -> Vec<([u8; 4], String)> {
        let names = Parent { id: [9; 16], path: path.into() }.names(url).unwrap();
        let text = |name: Name| {
            let units: Vec<u16> =
                name.bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
            let is_url = name.code == codes::MACX;
            let text =
                if is_url { String::from_utf8(name.bytes).unwrap() } else { String::from_utf16(&units).unwrap() };
            (name.code, text)
        };
        names.into_iter().map(text).collect()
    }

    #[test]
    fn names_by_the_kind_of_path() {
        let relative = (codes::W2RU, String::from(".\\a b\\base.vhd"));
        assert_eq!(names("./a b/base.vhd", false), core::slice::from_ref(&relative));
        assert_eq!(names("a b/base.vhd", true), [relative, (codes::MACX, "file://./a%20b/base.vhd".into())]);
        let absolute = (codes::W2KU, String::from("\\srv\\base.vhd"));
        assert_eq!(names("/srv/base.vhd", true), [absolute, (codes::MACX, "file:///srv/base.vhd".into())]);
    }

    #[test]
    fn a_name_takes_whole_sectors() {
        let name = |length| Name { code: codes::W2RU, bytes: vec![1; length] };
        assert_eq!([1, 512, 513].map(|length| name(length).room()), [512, 512, 1024]);
        assert_eq!(name(513).at(4096), Locator { code: codes::W2RU, space: 1024, length: 513, offset: 4096 });
    }
}
