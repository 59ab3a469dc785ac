//! The descriptor: lines of text ("The Descriptor File"), in a file of its own or embedded in a sparse extent.

use crate::{ExtentLine, FormatError};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ops::Range;

/// The parentCID of a disk without a parent ("The header section").
pub const NO_PARENT: u32 = u32::MAX;

/// A content ID and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentId {
    /// The number.
    pub value: u32,
    /// The bytes of the descriptor in which its digits stand.
    pub digits: Range<usize>,
    /// Its first digit but zeroes is a capital letter, and no other one is. No program writes that but this one: a
    /// parentCID that the parent is yet to get is marked with it. Every reader takes it for the same number.
    pub marked: bool,
}

/// What is used of a descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// `CID`: changes when the content does.
    pub content_id: ContentId,
    /// `parentCID`: the parent's `CID` when this disk was made; [`NO_PARENT`] without one.
    pub parent_id: Option<ContentId>,
    /// `encoding`: the one that the names in the descriptor are written in, as bytes of the image. Hostile.
    pub encoding: Option<Vec<u8>>,
    /// `createType`, as bytes of the image. Hostile.
    pub create_type: Vec<u8>,
    /// `parentFileNameHint`, as bytes of the image. Hostile.
    pub parent_hint: Option<Vec<u8>>,
    /// The extents.
    pub extents: Vec<ExtentLine>,
    /// The content is encrypted (keys that begin with `encryption.`).
    pub encrypted: bool,
    /// `changeTrackPath`: VMware keeps a list of changed blocks in another file.
    pub change_tracking: bool,
}

impl Descriptor {
    /// Read a descriptor, which ends at the first zero byte.
    ///
    /// # Errors
    /// A clause about what is missing, stands twice, or cannot be read.
    pub fn parse(text: &[u8]) -> Result<Self, FormatError> {
        let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
        let text = &text[..end];
        let (mut content_id, mut parent_id, mut create_type, mut parent_hint) = (None, None, None, None);
        let (mut encoding, mut extents, mut encrypted, mut change_tracking) = (None, Vec::new(), false, false);
        let mut at = 0;
        for line in text.split(|&b| b == b'\n') {
            let start = at;
            at += line.len() + 1;
            let trimmed = line.trim_ascii();
            if let Some(extent) = ExtentLine::parse(trimmed)? {
                extents.push(extent);
                continue;
            }
            let Some(equals) = line.iter().position(|&b| b == b'=').filter(|_| !trimmed.starts_with(b"#")) else {
                continue;
            };
            let (key, value) = (line[..equals].trim_ascii(), &line[equals + 1..]);
            match key {
                b"CID" => once(&mut content_id, number(value, start + equals + 1, "CID")?, "CID")?,
                b"parentCID" => once(&mut parent_id, number(value, start + equals + 1, "parentCID")?, "parentCID")?,
                b"createType" => once(&mut create_type, unquote(value).to_vec(), "createType")?,
                b"parentFileNameHint" => once(&mut parent_hint, unquote(value).to_vec(), "parentFileNameHint")?,
                b"encoding" => once(&mut encoding, unquote(value).to_vec(), "encoding")?,
                b"changeTrackPath" => change_tracking = true,
                key => encrypted |= key.starts_with(b"encryption."),
            }
        }
        let missing = |key: &str| FormatError::corrupt(format!("the descriptor has no {key}"));
        Ok(Self {
            content_id: content_id.ok_or_else(|| missing("CID"))?,
            parent_id,
            encoding,
            create_type: create_type.ok_or_else(|| missing("createType"))?,
            parent_hint,
            extents,
            encrypted,
            change_tracking,
        })
    }

    /// The parent's content ID, if there is a parent.
    #[must_use]
    pub fn parent(&self) -> Option<u32> {
        self.parent_id.as_ref().map(|id| id.value).filter(|&id| id != NO_PARENT)
    }
}

fn once<T>(slot: &mut Option<T>, value: T, key: &str) -> Result<(), FormatError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(FormatError::corrupt(format!("{key} stands twice in the descriptor"))),
    }
}

fn unquote(value: &[u8]) -> &[u8] {
    let value = value.trim_ascii();
    value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value)
}

/// A content ID: up to eight hexadecimal digits. `at` is where `value` begins in the descriptor.
fn number(value: &[u8], at: usize, key: &str) -> Result<ContentId, FormatError> {
    let digits = value.trim_ascii();
    let start = at + (value.len() - value.trim_ascii_start().len());
    let text = core::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()));
    match text.and_then(|text| u32::from_str_radix(text, 16).ok()) {
        Some(value) => {
            let mut significant = digits.iter().skip_while(|&&digit| digit == b'0');
            let first = significant.next().is_some_and(u8::is_ascii_uppercase);
            let marked = first && !significant.any(u8::is_ascii_uppercase);
            Ok(ContentId { value, digits: start..start + digits.len(), marked })
        }
        None => Err(FormatError::corrupt(format!("{key} is not a number of up to eight hexadecimal digits"))),
    }
}

impl ContentId {
    /// The digits for another number, [`marked`](Self::marked) if that is wanted and the number
    /// [begins with a letter](next_content_id), as many as there are now: QEMU writes no leading zeroes. They can be written
    /// where they are within one sector, so that a crash leaves the old number or the new one. `offset` is where the
    /// descriptor begins in the file.
    ///
    /// # Errors
    /// When they cannot.
    pub fn replacement(&self, value: u32, marked: bool, offset: u64) -> Result<String, FormatError> {
        let mut digits = format!("{value:0width$x}", width = self.digits.len());
        let first = digits.bytes().position(|digit| digit != b'0').filter(|_| marked);
        if let Some(digit) = first.and_then(|first| digits.get_mut(first..=first)) {
            digit.make_ascii_uppercase();
        }
        let in_sector = offset.wrapping_add(self.digits.start as u64) % crate::SECTOR;
        if digits.len() != self.digits.len() || in_sector + digits.len() as u64 > crate::SECTOR {
            let text =
                "a content ID in the descriptor has too few digits, or begins in one sector and ends in the next: it \
                        cannot be replaced safely";
            return Err(FormatError::unsupported(text.to_string()));
        }
        Ok(digits)
    }
}

/// The content ID that a backing gets when something is committed into it from an image with the content ID `child`. It
/// follows from both, so that a commit that was interrupted between the two files is recognized, and two copies of a
/// backing that each got what another child held are not taken for each other. It has as many digits as the old one,
/// the first of which is a letter, so that it can be [marked](ContentId::marked); and is never the old one, nor one
/// with a meaning of its own.
#[must_use]
pub fn next_content_id(old: u32, child: Option<u32>) -> u32 {
    let digits = old.max(1).ilog2() / 4 + 1;
    let (mask, letters) = (u32::MAX >> (32 - 4 * digits), 0xa << (4 * (digits - 1)));
    let salt = child.map_or(0, |child| (child ^ (child >> 13)).wrapping_mul(0x85eb_ca6b));
    let salted = old ^ salt ^ (salt >> 16);
    let mut next = (salted ^ (salted >> 15)).wrapping_mul(0x9e37_79b1).wrapping_add(0x7f4a_7c15) & mask;
    while next == old || next >= NO_PARENT - 1 || next < letters {
        next = next.wrapping_add(0x1234_5679) & mask;
    }
    next
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"# Disk DescriptorFile\nversion=1\nCID=bd5129e8\nparentCID=7198cec3\n\
        createType=\"monolithicSparse\"\nparentFileNameHint=\"b c.vmdk\"\n# Extent description\n\
        RW 20480 SPARSE \"t.vmdk\"\n\n#DDB\nddb.adapterType = \"ide\"\n\0garbage\nCID=1\n";

    #[test]
    fn what_qemu_writes() {
        let descriptor = Descriptor::parse(TEXT).unwrap();
        assert_eq!(descriptor.content_id.value, 0xbd51_29e8);
        assert_eq!(&TEXT[descriptor.content_id.digits.clone()], b"bd5129e8");
        assert_eq!(descriptor.parent(), Some(0x7198_cec3));
        assert_eq!(&TEXT[descriptor.parent_id.as_ref().unwrap().digits.clone()], b"7198cec3");
        assert_eq!(descriptor.create_type, b"monolithicSparse");
        assert_eq!(descriptor.parent_hint.as_deref(), Some(b"b c.vmdk".as_slice()));
        assert_eq!(descriptor.extents.len(), 1);
        assert!(descriptor.is_one_file());
        assert!(!descriptor.encrypted && !descriptor.change_tracking);
    }

    #[test]
    fn spaces_line_ends_and_other_keys() {
        let text = b"CID = 0000000a \r\nparentCID=ffffffff\r\ncreateType=custom\r\nencryption.keySafe=\"x\"\r\nchangeTrackPath=\"y\"";
        let descriptor = Descriptor::parse(text).unwrap();
        assert_eq!((descriptor.content_id.value, descriptor.parent()), (10, None));
        assert_eq!(&text[descriptor.content_id.digits.clone()], b"0000000a");
        assert!(descriptor.encrypted && descriptor.change_tracking);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (text, words) in [
            ("createType=\"x\"", "no CID"),
            ("CID=1", "no createType"),
            ("CID=1\nCID=1\ncreateType=x", "CID stands twice"),
            ("CID=123456789\ncreateType=x", "CID is not a number"),
            ("CID=+1\ncreateType=x", "CID is not a number"),
            ("CID=\ncreateType=x", "CID is not a number"),
            ("CID=1\nparentCID=xyz\ncreateType=x", "parentCID is not a number"),
        ] {
            let error = Descriptor::parse(text.as_bytes()).unwrap_err();
            assert!(error.text.contains(words), "{text:?}: {}", error.text);
        }
    }

    #[test]
    fn a_content_id_is_replaced_in_one_sector_or_not_at_all() {
        let id = |start: usize, length: usize| ContentId { value: 1, digits: start..start + length, marked: false };
        assert_eq!(id(100, 8).replacement(0xabc, false, 512).unwrap(), "00000abc");
        assert_eq!(id(100, 3).replacement(0xabc, false, 512).unwrap(), "abc");
        assert!(id(100, 2).replacement(0xabc, false, 512).is_err());
        assert_eq!(id(504, 8).replacement(1, false, 512).unwrap(), "00000001");
        assert!(id(505, 8).replacement(1, false, 512).is_err());
        assert!(id(511 + 512, 8).replacement(1, false, 1024).is_err());
    }

    #[test]
    fn a_mark_is_one_capital_letter_in_front() {
        let read = |digits: &str| {
            let text = format!("CID=1\nparentCID={digits}\ncreateType=\"x\"\n");
            let id = Descriptor::parse(text.as_bytes()).unwrap().parent_id.unwrap();
            (id.value, id.marked)
        };
        for (digits, value, marked) in [
            ("Abc", 0xabc, true),
            ("00000Abc", 0xabc, true),
            ("F", 0xf, true),
            ("abc", 0xabc, false),
            ("ABC", 0xabc, false),
            ("AbC", 0xabc, false),
            ("1Ab", 0x1ab, false),
            ("0", 0, false),
            ("FFFFFFFF", NO_PARENT, false),
        ] {
            assert_eq!(read(digits), (value, marked), "{digits}");
        }
        for old in [0u32, 9, 0xabc, 0x7198_cec3, NO_PARENT - 1] {
            let id = ContentId { value: 1, digits: 0..8, marked: false };
            let next = next_content_id(old, Some(0x1234_5678));
            for marked in [false, true] {
                assert_eq!(read(&id.replacement(next, marked, 0).unwrap()), (next, marked));
            }
        }
    }

    #[test]
    fn the_next_content_id_is_another_one_of_as_many_digits() {
        let all = (0..40).chain((0..1000).map(|n| n * 4_294_967));
        for old in all.chain([0x7198_cec3, NO_PARENT, NO_PARENT - 1, 0x0fff_ffff, 0x1000_0000]) {
            let next = next_content_id(old, None);
            assert!(next != old && next != 0 && next < NO_PARENT - 1, "{old:x}");
            let digits = format!("{next:x}");
            assert_eq!(digits.len(), format!("{old:x}").len());
            assert!(digits.starts_with(|digit: char| digit.is_ascii_lowercase()), "{digits}");
            assert_eq!(next, next_content_id(old, None));
            // A short one has few others.
            let other = next_content_id(old, Some(7));
            assert!(other != old && (other != next || old < 0x1000), "{old:x}");
        }
    }
}
