//! Files without a loaded plugin that can still be recognized: their kind helps more than "unknown". A format stays here when
//! it gets a plugin, which may be missing.

use super::bundle::Bundle;
use super::ImageRead;

/// A kind of file that is known by its signature alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// A disk image of a format without a plugin, by the name that people have for it, and that of the format.
    Image(&'static str, &'static str),
    /// A disk image that the plugin of its format does not take for one, by the name that people have for it.
    Odd(&'static str),
    /// The description of a Parallels disk, whose images lie beside it.
    Bundle(Bundle),
    /// A file that some program has compressed as a whole.
    Compressed(&'static str),
    /// Several files in one.
    Archive(&'static str),
    /// Nothing at all.
    Empty,
}

/// Marks at their offsets, within the first [`LOOKED_AT`] bytes.
const MARKS: &[(usize, &[u8], Foreign)] = &[
    // "VDI Core", VirtualBox's signature word after its text of 64 bytes.
    (64, b"\x7f\x10\xda\xbe", Foreign::Image("VDI", "vdi")),
    // QEMU, docs/interop/qed_spec.txt, "Header".
    (0, b"QED\0", Foreign::Image("QED", "qed")),
    (0, b"QFI\xfb\0\0\0\x01", Foreign::Image("qcow (version 1)", "qcow")),
    // QEMU, docs/interop/parallels.txt, "Header".
    (0, b"WithoutFreeSpace", Foreign::Image("Parallels", "parallels")),
    (0, b"WithouFreSpacExt", Foreign::Image("Parallels", "parallels")),
    // VMware Virtual Disk Format: sparse extents of ESX Server.
    (0, b"COWD", Foreign::Image("VMware COWD", "vmdk")),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", Foreign::Image("VMware SESparse", "vmdk")),
    // RFC 1952, 2.3.1, with the only existing method; RFC 8878, 3.1.1; the .xz file format, 2.1.1.1.
    (0, b"\x1f\x8b\x08", Foreign::Compressed("gzip")),
    (0, b"\x28\xb5\x2f\xfd", Foreign::Compressed("zstd")),
    (0, b"\xfd7zXZ\0", Foreign::Compressed("xz")),
    (0, b"BZh", Foreign::Compressed("bzip2")),
    // POSIX.1-1988, "ustar Interchange Format": an OVA file is one.
    (257, b"ustar", Foreign::Archive("tar")),
];

/// How the element of a Parallels `DiskDescriptor.xml` begins, which stands behind the line that makes it XML.
const DESCRIPTION: &[u8] = b"<Parallels_disk_image";

/// Bytes that are looked at, once: every raw image is asked.
const LOOKED_AT: usize = 512;

impl Foreign {
    /// Recognize a file by its signature.
    #[must_use]
    pub fn of(image: &dyn ImageRead) -> Option<Self> {
        if image.length() == 0 {
            return Some(Self::Empty);
        }
        let mut start = [0; LOOKED_AT];
        let length = image.read_at(0, &mut start).ok()?;
        let start = start.get(..length)?;
        let is_at = |offset: usize, mark: &[u8]| start.get(offset..).is_some_and(|bytes| bytes.starts_with(mark));
        if start.starts_with(b"<?xml") && start.windows(DESCRIPTION.len()).any(|bytes| bytes == DESCRIPTION) {
            return Some(Self::Bundle(Bundle::read(image)));
        }
        MARKS.iter().find(|(offset, mark, _)| is_at(*offset, mark)).map(|(_, _, what)| what.clone())
    }
}

impl std::fmt::Display for Foreign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image(name, _) => write!(
                f,
                "looks like a {name} image, for which no plugin is loaded: convert it to qcow2 with the program that made it"
            ),
            Self::Odd(name) => {
                write!(
                    f,
                    "looks like a {name} image, but is cut off, damaged, or of a version that its plugin does not know"
                )
            }
            Self::Bundle(disk) => write!(f, "describes a Parallels disk, whose images lie beside it: {disk}"),
            Self::Compressed(by) => write!(f, "looks like a file compressed with {by}: unpack it"),
            Self::Archive(by) => write!(f, "looks like an archive of {by} (an OVA file is one): unpack it"),
            Self::Empty => write!(f, "is empty"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    struct Bytes(Vec<u8>);

    impl ImageRead for Bytes {
        fn length(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
            let rest = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).unwrap_or_default();
            let length = rest.len().min(buffer.len());
            buffer[..length].copy_from_slice(&rest[..length]);
            Ok(length)
        }
    }

    #[test]
    fn marks_are_told_by_their_place() {
        let of = |bytes: Vec<u8>| Foreign::of(&Bytes(bytes));
        assert_eq!(of(Vec::new()), Some(Foreign::Empty));
        assert_eq!(of(b"WithoutFreeSpace".to_vec()), Some(Foreign::Image("Parallels", "parallels")));
        assert_eq!(of(b"WithoutFreeSpac".to_vec()), None, "a mark that is cut off is none");
        assert_eq!(of(vec![0; 100]), None);
        let bundle = b"<?xml version='1.0' encoding='UTF-8'?>\n<Parallels_disk_image Version=\"1.0\">";
        assert_eq!(of(bundle.to_vec()), Some(Foreign::Bundle(Bundle::Unknown)));
        assert_eq!(of(bundle[..50].to_vec()), None);
        let mut vdi = b"<<< Oracle VM VirtualBox Disk Image >>>\n".to_vec();
        vdi.resize(64, 0);
        vdi.extend(b"\x7f\x10\xda\xbe");
        assert_eq!(of(vdi), Some(Foreign::Image("VDI", "vdi")));
        assert!(MARKS.iter().all(|(offset, mark, _)| offset + mark.len() <= LOOKED_AT));
    }
}
