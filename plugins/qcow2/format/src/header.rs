//! The image header ("Header" in the specification).

use crate::error::{HeaderError, HeaderErrorKind};
use crate::extension::{Bitmaps, Extension, ExtensionKind, FeatureName};
use crate::refcount::RefcountOrder;
use crate::types::{ClusterSize, HostOffset};
use alloc::format;
use alloc::vec::Vec;

/// The first four bytes of an image: `QFI\xfb`.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Byte offset of `size`, the virtual size in bytes (8 bytes).
pub const VIRTUAL_SIZE_FIELD: u64 = 24;
/// Byte offset of `l1_size` (4 bytes), which is followed by `l1_table_offset` (8 bytes).
pub const L1_SIZE_FIELD: u64 = 36;
/// Byte offset of `refcount_table_offset` (8 bytes), followed by `refcount_table_clusters` (4 bytes).
pub const REFCOUNT_TABLE_FIELD: u64 = 48;
/// Byte offset of `incompatible_features` (8 bytes) in a version 3 header.
pub const INCOMPATIBLE_OFFSET: u64 = 72;
/// Byte offset of `autoclear_features` (8 bytes) in a version 3 header.
pub const AUTOCLEAR_OFFSET: u64 = 88;

/// Longest L1 table that QEMU opens, in bytes (`QCOW_MAX_L1_SIZE`).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Longest refcount table that QEMU opens, in bytes (`QCOW_MAX_REFTABLE_SIZE`).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Longest backing file name in bytes ("Header", `backing_file_size`).
pub const MAX_BACKING_NAME: u32 = 1023;
const V2_LENGTH: u32 = 72;
const V3_LENGTH: u32 = 104;

/// Bits of `incompatible_features`.
pub mod incompatible {
    /// Refcounts may be inconsistent.
    pub const DIRTY: u64 = 1;
    /// Any data structure may be corrupt.
    pub const CORRUPT: u64 = 2;
    /// Guest data is in an external file.
    pub const DATA_FILE: u64 = 4;
    /// `compression_type` is not zlib.
    pub const COMPRESSION_TYPE: u64 = 8;
    /// L2 entries have 128 bits, with subclusters.
    pub const EXTENDED_L2: u64 = 16;
    /// All bits that the specification names.
    pub const KNOWN: u64 = 31;
}

/// Bits of `compatible_features`.
pub mod compatible {
    /// Refcount updates may be put off.
    pub const LAZY_REFCOUNTS: u64 = 1;
}

/// Bits of `autoclear_features`.
pub mod autoclear {
    /// The bitmaps extension is consistent with the content.
    pub const BITMAPS: u64 = 1;
    /// The external data file is a valid raw image.
    pub const DATA_FILE_RAW: u64 = 2;
}

/// Version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// `compat=0.10`.
    V2,
    /// `compat=1.1`.
    V3,
}

/// How compressed clusters are compressed ("Header", `compression_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// A parsed header. Offsets are not yet checked against the file's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of the format.
    pub version: Version,
    /// Cluster size.
    pub cluster_size: ClusterSize,
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Name of the backing file, as it stands in the image. Hostile.
    pub backing_name: Option<Vec<u8>>,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Number of entries of the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table begins.
    pub l1_table: HostOffset,
    /// Where the refcount table begins.
    pub refcount_table: HostOffset,
    /// Length of the refcount table in clusters.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table begins.
    pub snapshot_table: HostOffset,
    /// Bits of [`incompatible`]; 0 in version 2.
    pub incompatible: u64,
    /// Bits of [`compatible`]; 0 in version 2.
    pub compatible: u64,
    /// Bits of [`autoclear`]; 0 in version 2.
    pub autoclear: u64,
    /// Width of refcounts; 16 bits in version 2.
    pub refcount_order: RefcountOrder,
    /// Length of the header in bytes, without extensions.
    pub header_length: u32,
    /// Compression of compressed clusters.
    pub compression: CompressionType,
    /// The header extensions, in their order.
    pub extensions: Vec<Extension>,
}

/// How many bytes from the start of a file [`Header::parse`] needs: the first cluster, as far as it is there.
/// `start` is the first 24 bytes of the file or more; `None` if they are not those of a qcow2 image.
#[must_use]
pub fn header_bytes_needed(start: &[u8]) -> Option<u64> {
    if start.get(0..4)? != MAGIC {
        return None;
    }
    let bits = u32::from_be_bytes(start.get(20..24)?.try_into().ok()?);
    Some(ClusterSize::from_bits(bits)?.bytes())
}

/// Big-endian fields of a header that has been checked to be long enough.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        self.0.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        self.0.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
    }
}

fn truncated(length: usize) -> HeaderError {
    HeaderError::new(
        HeaderErrorKind::Truncated,
        length as u64,
        format!("the file ends after {length} bytes, within the qcow2 header"),
    )
}

impl Header {
    /// Parse a header from the first cluster of a file, or from the part of it that the file has.
    ///
    /// # Errors
    /// [`HeaderError`] for a file that is not qcow2, a header that is cut off, an unknown version, and fields
    /// with values that no image may have. Feature bits are reported as they are, not judged.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        if bytes.len() < 4 || bytes[0..4] != MAGIC {
            return Err(HeaderError::new(HeaderErrorKind::NotQcow2, 0, "the file does not begin with the qcow2 magic"));
        }
        if bytes.len() < V2_LENGTH as usize {
            return Err(truncated(bytes.len()));
        }
        let f = Fields(bytes);
        let version = match f.u32(4) {
            2 => Version::V2,
            3 => Version::V3,
            other => {
                return Err(HeaderError::new(
                    HeaderErrorKind::Unsupported,
                    4,
                    format!("qcow2 version {other} is not supported (only 2 and 3 are)"),
                ))
            }
        };
        let bits = f.u32(20);
        let cluster_size = ClusterSize::from_bits(bits)
            .ok_or_else(|| HeaderError::corrupt(20, format!("cluster_bits is {bits}, not 9 to 21")))?;
        if version == Version::V3 && bytes.len() < V3_LENGTH as usize {
            return Err(truncated(bytes.len()));
        }
        let v3 = |at: usize| if version == Version::V3 { f.u64(at) } else { 0 };
        let (refcount_order, header_length) = match version {
            Version::V2 => (4, V2_LENGTH),
            Version::V3 => (f.u32(96), f.u32(100)),
        };
        // "At least 104 bytes and must be a multiple of 8": otherwise it is not clear where extensions begin.
        if header_length < V2_LENGTH
            || (version == Version::V3 && (header_length < V3_LENGTH || header_length % 8 != 0))
            || u64::from(header_length) > cluster_size.bytes()
        {
            return Err(HeaderError::corrupt(100, format!("header_length is {header_length}")));
        }
        if bytes.len() < header_length as usize {
            return Err(truncated(bytes.len()));
        }
        let refcount_order = RefcountOrder::new(refcount_order)
            .ok_or_else(|| HeaderError::corrupt(96, format!("refcount_order is {refcount_order}, not 0 to 6")))?;
        let mut header = Self {
            version,
            cluster_size,
            virtual_size: f.u64(24),
            backing_name: None,
            crypt_method: f.u32(32),
            l1_entries: f.u32(36),
            l1_table: HostOffset(f.u64(40)),
            refcount_table: HostOffset(f.u64(48)),
            refcount_table_clusters: f.u32(56),
            snapshots: f.u32(60),
            snapshot_table: HostOffset(f.u64(64)),
            incompatible: v3(72),
            compatible: v3(80),
            autoclear: v3(88),
            refcount_order,
            header_length,
            compression: compression_of(bytes, header_length)?,
            extensions: Vec::new(),
        };
        header.check_compression()?;
        header.check_tables()?;
        header.parse_variable_part(bytes, f.u64(8), f.u32(16))?;
        Ok(header)
    }

    /// Incompatible feature bit 3 and `compression_type` say the same thing twice: QEMU opens no image in which they differ.
    fn check_compression(&self) -> Result<(), HeaderError> {
        if self.has(incompatible::COMPRESSION_TYPE) == (self.compression != CompressionType::Zlib) {
            return Ok(());
        }
        let text = "the compression type and its incompatible feature bit contradict each other";
        Err(HeaderError::corrupt(INCOMPATIBLE_OFFSET, text))
    }

    /// Table fields that can be judged without the file: alignment, lengths, room for the virtual size.
    fn check_tables(&self) -> Result<(), HeaderError> {
        let cs = self.cluster_size;
        if self.virtual_size > i64::MAX as u64 {
            return Err(HeaderError::corrupt(24, format!("the virtual size is {} bytes", self.virtual_size)));
        }
        for (field, name, offset) in [
            (40, "l1_table_offset", self.l1_table),
            (48, "refcount_table_offset", self.refcount_table),
            (64, "snapshots_offset", self.snapshot_table),
        ] {
            let unused = match field {
                40 => self.l1_entries == 0,
                64 => self.snapshots == 0,
                _ => false,
            };
            if !unused && (cs.offset_in(offset.0) != 0 || offset.0 == 0 || offset.0 > i64::MAX as u64) {
                return Err(HeaderError::corrupt(field, format!("{name} is {offset}, not the start of a cluster")));
            }
        }
        if u64::from(self.l1_entries) * 8 > MAX_L1_BYTES {
            return Err(HeaderError::corrupt(36, format!("l1_size is {}, more than 32 MiB", self.l1_entries)));
        }
        let needed = self.virtual_size.div_ceil(self.l2_coverage());
        if u64::from(self.l1_entries) < needed {
            return Err(HeaderError::corrupt(
                36,
                format!(
                    "l1_size is {}, too small for the virtual size of {} bytes",
                    self.l1_entries, self.virtual_size
                ),
            ));
        }
        let table = u64::from(self.refcount_table_clusters) << cs.bits();
        if table == 0 || table > MAX_REFCOUNT_TABLE_BYTES.max(cs.bytes()) {
            return Err(HeaderError::corrupt(
                56,
                format!("refcount_table_clusters is {}", self.refcount_table_clusters),
            ));
        }
        Ok(())
    }

    /// Header extensions and backing file name.
    fn parse_variable_part(&mut self, bytes: &[u8], name_at: u64, name_len: u32) -> Result<(), HeaderError> {
        let cluster = self.cluster_size.bytes();
        let first = usize::try_from(cluster).unwrap_or(usize::MAX).min(bytes.len());
        let start = self.header_length as usize;
        let mut end = first;
        if name_at != 0 {
            if name_len > MAX_BACKING_NAME {
                return Err(HeaderError::corrupt(16, format!("backing_file_size is {name_len}, more than 1023")));
            }
            let from = usize::try_from(name_at).ok().filter(|&from| from >= start && name_at <= cluster);
            let range = from.and_then(|from| Some(from..from.checked_add(name_len as usize)?));
            let Some(range) = range.filter(|range| range.end as u64 <= cluster) else {
                return Err(HeaderError::corrupt(
                    8,
                    format!("backing_file_offset is {name_at}, not within the first cluster"),
                ));
            };
            let name = bytes.get(range.clone()).ok_or_else(|| truncated(bytes.len()))?;
            end = range.start;
            if name_len > 0 {
                self.backing_name = Some(name.to_vec());
            }
        }
        self.extensions = Extension::parse_all(bytes.get(start..end).unwrap_or(&[]), start as u64)?;
        Ok(())
    }

    /// Bytes of an L2 entry: 8, or 16 with extended L2 entries.
    #[must_use]
    pub const fn l2_entry_bytes(&self) -> u64 {
        if self.has(incompatible::EXTENDED_L2) {
            16
        } else {
            8
        }
    }

    /// Entries of an L2 table.
    #[must_use]
    pub const fn l2_entries(&self) -> u64 {
        self.cluster_size.bytes() / self.l2_entry_bytes()
    }

    /// Guest bytes that one L2 table maps.
    #[must_use]
    pub const fn l2_coverage(&self) -> u64 {
        self.cluster_size.bytes() * self.l2_entries()
    }

    /// Whether an incompatible feature bit is set.
    #[must_use]
    pub const fn has(&self, bit: u64) -> bool {
        self.incompatible & bit != 0
    }

    /// The data of the first extension of a kind.
    #[must_use]
    pub fn extension(&self, kind: ExtensionKind) -> Option<&Extension> {
        self.extensions.iter().find(|e| e.kind == kind)
    }

    /// The recorded format of the backing file, as it stands in the image. Hostile.
    #[must_use]
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.extension(ExtensionKind::BackingFormat).map(|e| e.data.as_slice())
    }

    /// The name that the image itself gives to a feature bit.
    #[must_use]
    pub fn feature_name(&self, class: u8, bit: u8) -> Option<Vec<u8>> {
        let table = self.extension(ExtensionKind::FeatureNames)?;
        FeatureName::parse_table(&table.data).into_iter().find(|f| f.class == class && f.bit == bit).map(|f| f.name)
    }

    /// The bitmaps extension, if it is there and long enough.
    #[must_use]
    pub fn bitmaps(&self) -> Option<Bitmaps> {
        self.extension(ExtensionKind::Bitmaps).and_then(|e| Bitmaps::parse(&e.data))
    }

    /// Length of the L1 table in bytes.
    #[must_use]
    pub fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_entries) * 8
    }

    /// Length of the refcount table in bytes.
    #[must_use]
    pub fn refcount_table_bytes(&self) -> u64 {
        u64::from(self.refcount_table_clusters) << self.cluster_size.bits()
    }
}

/// `compression_type` stands at byte 104 of headers that are long enough.
fn compression_of(bytes: &[u8], header_length: u32) -> Result<CompressionType, HeaderError> {
    let value = if header_length > V3_LENGTH { bytes.get(104).copied().unwrap_or(0) } else { 0 };
    match value {
        0 => Ok(CompressionType::Zlib),
        1 => Ok(CompressionType::Zstd),
        other => Err(HeaderError::new(
            HeaderErrorKind::Unsupported,
            104,
            format!("compression_type {other} is not supported (only 0, zlib, and 1, zstd, are)"),
        )),
    }
}
