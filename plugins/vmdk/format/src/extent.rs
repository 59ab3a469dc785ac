//! The extents of a disk, one line each ("The Descriptor File", section "Extent description"):
//! `RW 4192256 SPARSE "disk-s001.vmdk"`, `RW 20480 FLAT "disk-flat.vmdk" 0`, `RW 20480 VMFSSPARSE "disk-000001-delta.vmdk"`.
//! The types that ESXi writes, and that the document does not list, are those that QEMU knows (`vmdk_parse_extents`).

use crate::{Descriptor, FormatError, SECTOR};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// An extent line, as it stands there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// `RW`, `RDONLY` or `NOACCESS`.
    pub access: Vec<u8>,
    /// Size in sectors.
    pub sectors: u64,
    /// `SPARSE`, `FLAT`, … Hostile.
    pub kind: Vec<u8>,
    /// The name of its file; empty if there is none. Hostile.
    pub name: Vec<u8>,
    /// Where it begins in its file, in sectors, if the line says that.
    pub offset: Option<u64>,
}

/// How the data of an extent is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// A hosted sparse extent, with a header and grains.
    Sparse,
    /// A sparse extent of ESX (COWD).
    Cowd,
    /// A space-efficient sparse extent, which is only read.
    SeSparse,
    /// Plain bytes, from this byte of the file on.
    Flat(u64),
}

/// A part of a disk in a file of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskExtent {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, at least one sector.
    pub length: u64,
    /// How it is stored.
    pub storage: Storage,
    /// The name of its file. Hostile.
    pub name: Vec<u8>,
}

impl ExtentLine {
    /// Take a line apart, if it is an extent's.
    ///
    /// # Errors
    /// When it begins as one and cannot be read: without it, the disk would be another one.
    pub(crate) fn parse(line: &[u8]) -> Result<Option<Self>, FormatError> {
        let (access, rest) = word(line);
        if !matches!(access, b"RW" | b"RDONLY" | b"NOACCESS") {
            return Ok(None);
        }
        match Self::parts(access, rest) {
            Some(extent) => Ok(Some(extent)),
            None => {
                let shown: Vec<u8> = line.iter().copied().take(80).collect();
                Err(FormatError::corrupt(format!(
                    "the extent \"{}\" of the descriptor cannot be read",
                    text_of(&shown)
                )))
            }
        }
    }

    /// What follows the access: sectors, kind, name and offset.
    fn parts(access: &[u8], rest: &[u8]) -> Option<Self> {
        let (sectors, rest) = word(rest);
        let (kind, rest) = word(rest);
        let rest = rest.trim_ascii();
        let (name, rest) = match rest.strip_prefix(b"\"") {
            Some(quoted) => {
                let end = quoted.iter().position(|&b| b == b'"')?;
                (&quoted[..end], &quoted[end + 1..])
            }
            None => word(rest),
        };
        let sectors = number(sectors)?;
        let offset = match word(rest).0 {
            b"" => None,
            offset => Some(number(offset)?),
        };
        let (access, kind, name) = (access.to_vec(), kind.to_vec(), name.to_vec());
        (!kind.is_empty()).then_some(Self { access, sectors, kind, name, offset })
    }
}

/// The first word, and what follows it.
fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let text = text.trim_ascii_start();
    text.split_at(text.iter().position(u8::is_ascii_whitespace).unwrap_or(text.len()))
}

fn number(text: &[u8]) -> Option<u64> {
    core::str::from_utf8(text).ok().filter(|t| t.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()
}

impl Descriptor {
    /// Whether the disk is the one sparse extent in the file that the descriptor is embedded in.
    #[must_use]
    pub fn is_one_file(&self) -> bool {
        matches!(self.create_type.as_slice(), b"monolithicSparse" | b"streamOptimized")
            && matches!(self.extents.as_slice(), [line] if line.kind == b"SPARSE")
    }

    /// The extents of a disk in several files, each in a file of its own.
    ///
    /// # Errors
    /// For a kind of disk or extent that is not known, and sizes that no disk has.
    pub fn disk_extents(&self) -> Result<Vec<DiskExtent>, FormatError> {
        let known: &[&[u8]] =
            &[b"monolithicFlat", b"twoGbMaxExtentFlat", b"twoGbMaxExtentSparse", b"vmfs", b"vmfsSparse", b"seSparse"];
        if !known.contains(&self.create_type.as_slice()) {
            let text = format!(
                "a vmdk of type {} is not supported in this place: convert it with `qemu-img convert -O vmdk`",
                text_of(&self.create_type)
            );
            return Err(FormatError::unsupported(text));
        }
        let mut extents = Vec::new();
        let mut start: u64 = 0;
        for (index, line) in self.extents.iter().enumerate() {
            let name = || format!("extent {} of the descriptor", index + 1);
            if line.access != b"RW" {
                let text = format!("{} is {}, and only RW is supported", name(), text_of(&line.access));
                return Err(FormatError::unsupported(text));
            }
            let storage = match (line.kind.as_slice(), line.offset) {
                (b"SPARSE", _) => Storage::Sparse,
                (b"VMFSSPARSE", _) => Storage::Cowd,
                (b"SESPARSE", _) => Storage::SeSparse,
                (b"FLAT" | b"VMFS", offset) => {
                    let offset = offset.unwrap_or(0).checked_mul(SECTOR).filter(|&offset| offset <= i64::MAX as u64);
                    Storage::Flat(
                        offset.ok_or_else(|| FormatError::corrupt(format!("{} begins past any file", name())))?,
                    )
                }
                (kind, _) => {
                    let text = format!("{} is of the type {}, which is not supported", name(), text_of(kind));
                    return Err(FormatError::unsupported(text));
                }
            };
            let length = line.sectors.checked_mul(SECTOR).filter(|&length| length > 0);
            let end = length.and_then(|length| start.checked_add(length)).filter(|&end| end <= i64::MAX as u64);
            let (Some(length), Some(end)) = (length, end) else {
                return Err(FormatError::corrupt(format!("{} has no size that a disk has", name())));
            };
            extents.push(DiskExtent { start, length, storage, name: line.name.clone() });
            start = end;
        }
        if extents.is_empty() {
            return Err(FormatError::corrupt("the descriptor has no extents"));
        }
        Ok(extents)
    }
}

/// Bytes of an image as text for a message.
fn text_of(bytes: &[u8]) -> String {
    format!("{}", bytes.escape_ascii())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::vec;

    fn disk(kind: &str, lines: &str) -> Result<Vec<DiskExtent>, FormatError> {
        Descriptor::parse(format!("CID=1\ncreateType=\"{kind}\"\n{lines}\n").as_bytes()).unwrap().disk_extents()
    }

    #[test]
    fn split_and_flat() {
        let extents = disk("twoGbMaxExtentSparse", "RW 4 SPARSE \"a b-s001.vmdk\"\nRW 3 SPARSE c\r").unwrap();
        let extent = |start, length, storage, name: &str| DiskExtent { start, length, storage, name: name.into() };
        assert_eq!(
            extents,
            vec![extent(0, 2048, Storage::Sparse, "a b-s001.vmdk"), extent(2048, 1536, Storage::Sparse, "c")]
        );
        assert_eq!(
            disk("monolithicFlat", "RW 4 FLAT \"f\" 7").unwrap(),
            vec![extent(0, 2048, Storage::Flat(3584), "f")]
        );
        assert_eq!(disk("vmfs", "RW 4 VMFS \"f\"").unwrap(), vec![extent(0, 2048, Storage::Flat(0), "f")]);
        let delta = "RW 4 VMFSSPARSE \"x-000001-delta.vmdk\"\r";
        assert_eq!(disk("vmfsSparse", delta).unwrap(), vec![extent(0, 2048, Storage::Cowd, "x-000001-delta.vmdk")]);
        let delta = "RW 4 SESPARSE \"x-000001-sesparse.vmdk\"";
        assert_eq!(
            disk("seSparse", delta).unwrap(),
            vec![extent(0, 2048, Storage::SeSparse, "x-000001-sesparse.vmdk")]
        );
    }

    #[test]
    fn what_is_refused_is_named() {
        let largest = format!("RW {} FLAT \"f\" 0\nRW 1 FLAT \"g\" 0", i64::MAX as u64 / 512);
        for (kind, lines, words) in [
            ("monolithicSparse", "RW 4 SPARSE \"f\"", "monolithicSparse"),
            ("monolithicFlat", "", "no extents"),
            ("monolithicFlat", "RDONLY 4 FLAT \"f\" 0", "RDONLY"),
            ("monolithicFlat", "RW 0 FLAT \"f\" 0", "no size"),
            ("monolithicFlat", "RW 18446744073709551615 FLAT \"f\" 0", "no size"),
            ("monolithicFlat", "RW 4 FLAT \"f\" 36028797018963968", "past any file"),
            ("monolithicFlat", "RW 4 ZERO", "ZERO"),
            ("monolithicFlat", "RW 4 VMFSRDM \"f\"", "VMFSRDM"),
            ("monolithicFlat", largest.as_str(), "extent 2"),
            ("fullDevice", "RW 4 FLAT \"/dev/sda\" 0", "fullDevice"),
            ("\u{1b}[2J", "", "\\x1b"),
        ] {
            let error = disk(kind, lines).unwrap_err();
            assert!(error.text.contains(words), "{kind} {lines}: {}", error.text);
        }
    }

    #[test]
    fn lines_of_other_kinds() {
        for line in ["", "rw 4 SPARSE \"a\"", "RWX", "ddb.x = \"RW\"", "# RW 4"] {
            assert_eq!(ExtentLine::parse(line.as_bytes()), Ok(None), "{line}");
        }
        for line in [
            "RW",
            "RW x SPARSE \"a\"",
            "RW 4",
            "RW -4 SPARSE \"a\"",
            "RW 4 FLAT \"a",
            "RW 99999999999999999999 FLAT \"a\" 0",
            "RW 4 FLAT \"a\" 99999999999999999999",
            "RW 4 FLAT \"a\" -1",
            "RW 4 FLAT \"\u{1b}[2J",
        ] {
            let error = ExtentLine::parse(line.as_bytes()).unwrap_err();
            assert!(error.text.contains("cannot be read") && !error.text.contains('\u{1b}'), "{line}: {}", error.text);
        }
    }
}
