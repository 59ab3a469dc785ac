//! A new, empty image ("Header", "Header extensions", "Host cluster management").
//!
//! The layout is that of `qemu-img create`: header cluster, refcount table, refcount blocks, L1 table. With preallocated
//! clusters, their L2 tables follow, and then the clusters themselves, in the order of the disk.

use crate::extension::ExtensionKind;
use crate::header::{
    compatible, incompatible, CompressionType, Version, MAGIC, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES,
};
use crate::refcount::{set_refcount, RefcountOrder};
use crate::subcluster::SUBCLUSTERS;
use crate::table::{L1Entry, L2Entry};
use crate::types::{ClusterSize, HostOffset};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

/// Length of a version 2 header in bytes, and of a version 3 header with its compression type and padding.
const V2_LENGTH: u32 = 72;
const V3_LENGTH: u32 = 112;
/// Images are a multiple of this many bytes large: QEMU's sector.
const SECTOR: u64 = 512;
/// Longest backing file name in bytes ("Header", `backing_file_size`).
const MAX_BACKING_NAME: usize = 1023;
/// Shortest subcluster in bytes ("Extended L2 Entries"): one sector.
const MIN_SUBCLUSTER: u64 = 512;
/// Longest metadata of a preallocated image in bytes: it is made in memory.
const MAX_METADATA: u64 = 512 << 20;
/// QEMU leaves the feature name table out where a cluster has no room to spare.
const FEATURE_TABLE_MIN_CLUSTER: u64 = 8192;
/// Class (0 incompatible, 1 compatible, 2 autoclear), bit and name of every feature, as QEMU records them.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// What a new image has besides its metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: clusters are allocated when they are written.
    #[default]
    Off,
    /// A cluster for every part of the disk, in the tables only: the file has a hole there.
    Metadata,
    /// The same, and the file system has reserved the space.
    Falloc,
    /// The same, and zeroes were written.
    Full,
}

/// What a new image shall be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to a multiple of 512.
    pub virtual_size: u64,
    /// Version of the format.
    pub version: Version,
    /// Cluster size.
    pub cluster_size: ClusterSize,
    /// Refcount width; only 16 bits in version 2.
    pub refcount_order: RefcountOrder,
    /// Refcount updates may be put off; not in version 2.
    pub lazy_refcounts: bool,
    /// Compression of clusters that may be compressed one day; only zlib in version 2.
    pub compression: CompressionType,
    /// Subclusters: entries of L2 tables take 16 bytes; not in version 2.
    pub extended_l2: bool,
    /// What is allocated from the beginning; over a backing file only with subclusters, which still show what is below.
    pub preallocation: Preallocation,
    /// Name of the backing file, as it shall stand in the image.
    pub backing_name: Option<Vec<u8>>,
    /// Format of the backing file.
    pub backing_format: Option<Vec<u8>>,
}

impl CreateOptions {
    /// What `qemu-img create` makes without options.
    #[must_use]
    pub fn new(virtual_size: u64) -> Self {
        Self {
            virtual_size,
            version: Version::V3,
            cluster_size: ClusterSize::DEFAULT,
            refcount_order: RefcountOrder::BITS_16,
            lazy_refcounts: false,
            compression: CompressionType::Zlib,
            extended_l2: false,
            preallocation: Preallocation::Off,
            backing_name: None,
            backing_format: None,
        }
    }
}

/// Why an image cannot be made: one clause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateError(pub String);

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for CreateError {}

fn refused<T>(text: &str) -> Result<T, CreateError> {
    Err(CreateError(String::from(text)))
}

pub(crate) fn too_large() -> CreateError {
    CreateError(String::from("the image size is too large for qcow2 with this cluster size; use a larger one"))
}

/// A new image: a file of `length` zero bytes with `metadata` at its start. What lies past the end of `metadata` is all zero:
/// the L1 table of an image without preallocated clusters, or those clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Length of the file in bytes.
    pub length: u64,
    /// Header, refcount table and refcount blocks, from offset 0 on, and the L1 and L2 tables of preallocated clusters.
    pub metadata: Vec<u8>,
}

/// Where things are, in clusters.
struct Layout {
    table_clusters: u64,
    blocks: u64,
    l1_entries: u64,
    l1_cluster: u64,
    /// The first of the L2 tables, one for each L1 entry. None without preallocated clusters.
    l2_cluster: u64,
    l2_tables: u64,
    /// The first of the preallocated clusters.
    data_cluster: u64,
    data_clusters: u64,
    total: u64,
}

impl CreateOptions {
    /// Bytes of an entry of an L2 table.
    pub(crate) const fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 {
            16
        } else {
            8
        }
    }

    /// Bytes of the disk that one L2 table maps.
    const fn l2_coverage(&self) -> u64 {
        self.cluster_size.bytes() / self.l2_entry_bytes() * self.cluster_size.bytes()
    }
}

impl Layout {
    /// Sizes depend on each other: blocks count all clusters, themselves and their table included.
    fn of(options: &CreateOptions, virtual_size: u64) -> Result<Self, CreateError> {
        let cs = options.cluster_size;
        let l1_entries = virtual_size.div_ceil(options.l2_coverage());
        let l1_bytes = l1_entries.checked_mul(8).filter(|&bytes| bytes <= MAX_L1_BYTES).ok_or_else(too_large)?;
        let l1_clusters = cs.count_for(l1_bytes);
        let (l2_tables, data_clusters) = match options.preallocation {
            Preallocation::Off => (0, 0),
            _ => (l1_entries, cs.count_for(virtual_size)),
        };
        let per_block = options.refcount_order.entries_in(cs.bytes());
        let (mut table_clusters, mut blocks) = (1u64, 1u64);
        loop {
            // Of all of these there are fewer than bytes of a file: nothing here overflows.
            let l1_cluster = 1 + table_clusters + blocks;
            let l2_cluster = l1_cluster + l1_clusters;
            let data_cluster = l2_cluster + l2_tables;
            let total = data_cluster + data_clusters;
            let needed_blocks = total.div_ceil(per_block);
            let needed_table = cs.count_for(needed_blocks * 8);
            if total.checked_mul(cs.bytes()).is_none_or(|bytes| i64::try_from(bytes).is_err()) {
                return Err(too_large());
            }
            if needed_blocks <= blocks && needed_table <= table_clusters {
                return Ok(Self {
                    table_clusters,
                    blocks,
                    l1_entries,
                    l1_cluster,
                    l2_cluster,
                    l2_tables,
                    data_cluster,
                    data_clusters,
                    total,
                });
            }
            blocks = blocks.max(needed_blocks);
            table_clusters = table_clusters.max(needed_table);
            if table_clusters * cs.bytes() > MAX_REFCOUNT_TABLE_BYTES.max(cs.bytes()) {
                return Err(too_large());
            }
        }
    }

    /// Length of the file in bytes. Like QEMU's, it ends with the last preallocated cluster, or with the last entry of the L1
    /// table and not with the cluster of that.
    const fn length(&self, cluster_size: ClusterSize) -> u64 {
        let bytes = cluster_size.bytes();
        if self.data_clusters == 0 {
            return self.l1_cluster * bytes + self.l1_entries * 8;
        }
        self.total * bytes
    }
}

/// Make a new, empty image.
///
/// # Errors
/// [`CreateError`] for options that contradict each other, and for what does not fit.
pub fn create(options: &CreateOptions) -> Result<NewImage, CreateError> {
    let cs = options.cluster_size;
    check(options)?;
    let virtual_size = options
        .virtual_size
        .checked_next_multiple_of(SECTOR)
        .filter(|&size| size <= i64::MAX as u64)
        .ok_or_else(too_large)?;
    let layout = Layout::of(options, virtual_size)?;
    let preallocated = layout.data_clusters > 0;
    let metadata_clusters = if preallocated { layout.data_cluster } else { layout.l1_cluster };
    let bytes = metadata_clusters.checked_mul(cs.bytes()).filter(|&bytes| !preallocated || bytes <= MAX_METADATA);
    let bytes = bytes.ok_or_else(|| {
        CreateError(String::from(
            "the tables for preallocation would take more than 512 MiB; use a larger cluster_size",
        ))
    })?;
    let mut metadata = vec![0u8; usize::try_from(bytes).map_err(|_| too_large())?];

    let header = header(options, virtual_size, &layout)?;
    put(&mut metadata, 0, &header)?;
    for block in 0..layout.blocks {
        let at = cs.bytes() + block * 8;
        put(&mut metadata, at, &((1 + layout.table_clusters + block) * cs.bytes()).to_be_bytes())?;
    }
    let blocks_at = usize::try_from((1 + layout.table_clusters) * cs.bytes()).map_err(|_| too_large())?;
    let blocks = metadata.get_mut(blocks_at..).ok_or_else(too_large)?;
    for cluster in 0..layout.total {
        // The blocks follow each other, so that the index of a cluster is its number.
        let index = usize::try_from(cluster).map_err(|_| too_large())?;
        set_refcount(blocks, options.refcount_order, index, 1).ok_or_else(too_large)?;
    }
    for table in 0..layout.l2_tables {
        let at = HostOffset((layout.l2_cluster + table) * cs.bytes());
        let entry = L1Entry::Table { offset: at, copied: true }.encode();
        put(&mut metadata, layout.l1_cluster * cs.bytes() + table * 8, &entry.to_be_bytes())?;
    }
    for cluster in 0..layout.data_clusters {
        let offset = HostOffset((layout.data_cluster + cluster) * cs.bytes());
        // With subclusters, the second half stays zero: none of them is allocated, and all read as what is below.
        let at = layout.l2_cluster * cs.bytes() + cluster * options.l2_entry_bytes();
        put(&mut metadata, at, &L2Entry::Data { offset, copied: true }.encode().to_be_bytes())?;
    }
    Ok(NewImage { length: layout.length(cs), metadata })
}

pub(crate) fn check(options: &CreateOptions) -> Result<(), CreateError> {
    if options.version == Version::V2 {
        if options.refcount_order != RefcountOrder::BITS_16 {
            return refused("refcount_bits other than 16 need compat=1.1");
        }
        if options.lazy_refcounts {
            return refused("lazy_refcounts=on needs compat=1.1");
        }
        if options.compression != CompressionType::Zlib {
            return refused("compression_type other than zlib needs compat=1.1");
        }
        if options.extended_l2 {
            return refused("extended_l2=on needs compat=1.1");
        }
    }
    if options.extended_l2 && options.cluster_size.bytes() < MIN_SUBCLUSTER * u64::from(SUBCLUSTERS) {
        return refused("extended_l2=on needs a cluster_size of 16k or more");
    }
    if options.preallocation != Preallocation::Off && options.backing_name.is_some() && !options.extended_l2 {
        return refused("preallocation would hide the backing file: add extended_l2=on, or leave it out");
    }
    match &options.backing_name {
        Some(name) if name.is_empty() => refused("the name of the backing file is empty"),
        Some(name) if name.len() > MAX_BACKING_NAME => {
            refused("the name of the backing file is longer than 1023 bytes")
        }
        _ => Ok(()),
    }
}

fn put(metadata: &mut [u8], at: u64, bytes: &[u8]) -> Result<(), CreateError> {
    let start = usize::try_from(at).map_err(|_| too_large())?;
    let end = start.checked_add(bytes.len()).ok_or_else(too_large)?;
    metadata.get_mut(start..end).ok_or_else(too_large)?.copy_from_slice(bytes);
    Ok(())
}

/// The header with its extensions and the backing file's name.
fn header(options: &CreateOptions, virtual_size: u64, layout: &Layout) -> Result<Vec<u8>, CreateError> {
    let cs = options.cluster_size;
    let extensions = extensions(options)?;
    let length = if options.version == Version::V2 { V2_LENGTH } else { V3_LENGTH };
    let name: &[u8] = options.backing_name.as_deref().unwrap_or(&[]);
    let name_at = if name.is_empty() { 0 } else { u64::from(length) + extensions.len() as u64 };
    let l1_at = if layout.l1_entries == 0 { 0 } else { layout.l1_cluster * cs.bytes() };
    let number = |value: u64| u32::try_from(value).map_err(|_| too_large());

    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC);
    let version: u32 = if options.version == Version::V2 { 2 } else { 3 };
    out.extend_from_slice(&version.to_be_bytes());
    out.extend_from_slice(&name_at.to_be_bytes());
    out.extend_from_slice(&number(name.len() as u64)?.to_be_bytes());
    out.extend_from_slice(&cs.bits().to_be_bytes());
    out.extend_from_slice(&virtual_size.to_be_bytes());
    out.extend_from_slice(&0u32.to_be_bytes()); // crypt_method
    out.extend_from_slice(&number(layout.l1_entries)?.to_be_bytes());
    out.extend_from_slice(&l1_at.to_be_bytes());
    out.extend_from_slice(&cs.bytes().to_be_bytes()); // refcount_table_offset: cluster 1
    out.extend_from_slice(&number(layout.table_clusters)?.to_be_bytes());
    out.extend_from_slice(&0u32.to_be_bytes()); // nb_snapshots
    out.extend_from_slice(&0u64.to_be_bytes()); // snapshots_offset
    if options.version == Version::V3 {
        let zstd = options.compression == CompressionType::Zstd;
        let incompatible = if zstd { incompatible::COMPRESSION_TYPE } else { 0 }
            | if options.extended_l2 { incompatible::EXTENDED_L2 } else { 0 };
        let compatible = if options.lazy_refcounts { compatible::LAZY_REFCOUNTS } else { 0 };
        out.extend_from_slice(&incompatible.to_be_bytes());
        out.extend_from_slice(&compatible.to_be_bytes());
        out.extend_from_slice(&0u64.to_be_bytes()); // autoclear_features
        out.extend_from_slice(&options.refcount_order.order().to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(&[u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]);
    }
    out.extend_from_slice(&extensions);
    out.extend_from_slice(name);
    if out.len() as u64 > cs.bytes() {
        return refused("the name of the backing file does not fit into a cluster of this size");
    }
    Ok(out)
}

/// The header extensions with their end marker.
fn extensions(options: &CreateOptions) -> Result<Vec<u8>, CreateError> {
    let mut out = Vec::new();
    let mut add = |kind: ExtensionKind, data: &[u8]| {
        let length = u32::try_from(data.len()).map_err(|_| too_large())?;
        out.extend_from_slice(&kind.to_u32().to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(8), 0);
        Ok(())
    };
    if let (Some(_), Some(format)) = (&options.backing_name, &options.backing_format) {
        add(ExtensionKind::BackingFormat, format)?;
    }
    if options.version == Version::V3 && options.cluster_size.bytes() >= FEATURE_TABLE_MIN_CLUSTER {
        let mut table = Vec::new();
        for (class, bit, name) in FEATURE_NAMES {
            let start = table.len();
            table.extend_from_slice(&[class, bit]);
            table.extend_from_slice(name.as_bytes());
            table.resize(start + 48, 0);
        }
        add(ExtensionKind::FeatureNames, &table)?;
    }
    add(ExtensionKind::from_u32(0), &[])?;
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Header;

    #[test]
    fn what_is_made_can_be_parsed() {
        for bits in ClusterSize::MIN_BITS..=ClusterSize::MAX_BITS {
            for version in [Version::V2, Version::V3] {
                for order in 0..=6 {
                    let order = RefcountOrder::new(order).unwrap();
                    if version == Version::V2 && order != RefcountOrder::BITS_16 {
                        continue;
                    }
                    let mut options = CreateOptions::new(1_000_000_001);
                    options.version = version;
                    options.cluster_size = ClusterSize::from_bits(bits).unwrap();
                    options.refcount_order = order;
                    options.backing_name = Some(b"base.img".to_vec());
                    options.backing_format = Some(b"raw".to_vec());
                    let image = create(&options).unwrap();
                    let header = Header::parse(&image.metadata).unwrap();
                    assert_eq!(header.virtual_size, 1_000_000_512);
                    assert_eq!(header.backing_name.as_deref(), Some(&b"base.img"[..]));
                    assert_eq!(header.backing_format(), Some(&b"raw"[..]));
                    assert_eq!(header.l1_table.0 + header.l1_bytes(), image.length);
                    assert!(image.metadata.len() as u64 <= header.l1_table.0);
                }
            }
        }
    }

    #[test]
    fn preallocated_clusters_follow_the_tables_that_name_them() {
        for extended_l2 in [false, true] {
            let options = CreateOptions {
                preallocation: Preallocation::Metadata,
                extended_l2,
                cluster_size: ClusterSize::from_bits(14).unwrap(),
                ..CreateOptions::new((100 << 20) + 512)
            };
            let image = create(&options).unwrap();
            let header = Header::parse(&image.metadata).unwrap();
            let word = |at: u64| {
                let at = usize::try_from(at).unwrap();
                u64::from_be_bytes(image.metadata[at..at + 8].try_into().unwrap())
            };
            let width = if extended_l2 { 16 } else { 8 };
            let (clusters, per_table) = ((100 << 6) + 1, (16384 / width));
            let first = image.metadata.len() as u64;
            for cluster in 0..clusters {
                let table = word(header.l1_table.0 + cluster / per_table * 8);
                let at = (table & !(1 << 63)) + cluster % per_table * width;
                assert_eq!((table >> 63, word(at)), (1, 1 << 63 | (first + cluster * 16384)));
                assert!(!extended_l2 || word(at + 8) == 0);
            }
            assert_eq!(image.length, first + (100 << 20) + 16384);
            let refcounts = &image.metadata[32768..];
            let counted = (0..).take_while(|&i| crate::get_refcount(refcounts, options.refcount_order, i) == Some(1));
            assert_eq!(counted.count() as u64, image.length.div_ceil(16384));
        }
    }

    #[test]
    fn the_largest_images_are_made_and_larger_ones_refused() {
        let mut options = CreateOptions::new(128 << 30);
        options.cluster_size = ClusterSize::from_bits(9).unwrap();
        assert!(create(&options).is_ok());
        options.virtual_size += 1;
        assert!(create(&options).is_err());
        options.cluster_size = ClusterSize::from_bits(21).unwrap();
        options.virtual_size = i64::MAX as u64;
        assert!(create(&options).is_err());
        options.virtual_size = u64::MAX;
        assert!(create(&options).is_err());
        options.virtual_size = 0;
        assert!(create(&options).is_ok());
    }

    #[test]
    fn contradictions_are_refused() {
        let v2 = CreateOptions { version: Version::V2, ..CreateOptions::new(1 << 20) };
        assert!(create(&v2).is_ok());
        assert!(create(&CreateOptions { lazy_refcounts: true, ..v2.clone() }).is_err());
        assert!(create(&CreateOptions { compression: CompressionType::Zstd, ..v2.clone() }).is_err());
        assert!(create(&CreateOptions { refcount_order: RefcountOrder::new(3).unwrap(), ..v2.clone() }).is_err());
        assert!(create(&CreateOptions { backing_name: Some(vec![]), ..v2.clone() }).is_err());
        assert!(create(&CreateOptions { backing_name: Some(vec![b'a'; 1024]), ..v2.clone() }).is_err());
        assert!(create(&CreateOptions { extended_l2: true, ..v2.clone() }).is_err());
        let small = ClusterSize::from_bits(9).unwrap();
        let v3 = CreateOptions::new(1 << 20);
        assert!(create(&CreateOptions { extended_l2: true, cluster_size: small, ..v3.clone() }).is_err());
        let over = CreateOptions { preallocation: Preallocation::Full, backing_name: Some(vec![b'a']), ..v3 };
        assert!(create(&over).is_err());
        assert!(create(&CreateOptions { extended_l2: true, ..over }).is_ok());
        let huge = CreateOptions { preallocation: Preallocation::Metadata, ..CreateOptions::new(16 << 40) };
        assert!(create(&huge).unwrap_err().0.contains("cluster_size"));
        assert!(create(&CreateOptions { cluster_size: small, backing_name: Some(vec![b'a'; 500]), ..v2 }).is_err());
    }
}
