//! How long a new image becomes, as QEMU measures it.

use crate::create::{check, too_large};
use crate::{
    ClusterSize, CreateError, CreateOptions, Preallocation, RefcountOrder, Version, BITMAP_ENTRY_BYTES, MAX_L1_BYTES,
};

/// Bytes of an entry of an L1 table or refcount table.
const ENTRY: u64 = 8;

/// How long the file of a new image becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Virtual size in bytes, a multiple of 512.
    pub virtual_size: u64,
    /// Bytes of metadata of an image whose clusters are all allocated: header, L1 and L2 tables, refcounts.
    pub metadata: u64,
    /// Clusters take room from the beginning: space for data is preallocated.
    pub preallocated: bool,
}

/// Measure an image with these options before it is made.
///
/// # Errors
/// [`CreateError`] for options that contradict each other, and for a disk that is too large for them.
pub fn measure(options: &CreateOptions) -> Result<Measure, CreateError> {
    check(options)?;
    let virtual_size = options.virtual_size.checked_next_multiple_of(512).ok_or_else(too_large)?;
    let metadata = metadata(options, virtual_size).ok_or_else(too_large)?;
    let preallocated = matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full);
    Ok(Measure { virtual_size, metadata, preallocated })
}

/// Bytes of persistent bitmaps in a new image, all of whose bits are stored; each is given by its granularity in bytes and the
/// length of its name. `None` for an image that can have none, or that would become too large.
#[must_use]
pub fn measure_bitmaps(options: &CreateOptions, bitmaps: impl Iterator<Item = (u64, usize)>) -> Option<u64> {
    let cs = options.cluster_size;
    let (mut clusters, mut directory) = (0u64, 0u64);
    if options.version == Version::V2 {
        return None;
    }
    for (granularity, name) in bitmaps {
        // "Bitmaps extension" and "Bitmap table" in the specification: a table with an entry for each cluster of bits.
        let bits = options.virtual_size.div_ceil(granularity.max(1));
        let data = cs.count_for(bits.div_ceil(8));
        clusters = clusters.checked_add(data)?.checked_add(cs.count_for(data.checked_mul(ENTRY)?))?;
        let entry = (BITMAP_ENTRY_BYTES.checked_add(name)?).checked_next_multiple_of(8)?;
        directory = directory.checked_add(entry as u64)?;
    }
    clusters.checked_add(cs.count_for(directory))?.checked_mul(cs.bytes())
}

/// Bytes of metadata; `None` for a disk that is too large.
fn metadata(options: &CreateOptions, virtual_size: u64) -> Option<u64> {
    let cs = options.cluster_size;
    let data = cs.count_for(virtual_size);
    // One cluster after the other: the header, the L2 tables, the L1 table.
    let l2_tables = data.div_ceil(cs.bytes() / options.l2_entry_bytes());
    let l1_bytes = l2_tables.checked_mul(ENTRY).filter(|&bytes| bytes <= MAX_L1_BYTES)?;
    let tables = l2_tables.checked_add(cs.count_for(l1_bytes))?.checked_add(1)?;
    let all = tables.checked_add(refcounts(tables.checked_add(data)?, cs, options.refcount_order)?)?;
    // The file as a whole has to have a length.
    let length = all.checked_add(data)?.checked_mul(cs.bytes())?;
    i64::try_from(length).ok()?;
    all.checked_mul(cs.bytes())
}

/// Clusters of refcount blocks and of the refcount table for this many others, and for themselves.
fn refcounts(clusters: u64, cs: ClusterSize, order: RefcountOrder) -> Option<u64> {
    let (per_block, per_table) = (order.entries_in(cs.bytes()), cs.bytes() / ENTRY);
    let (mut blocks, mut table) = (0u64, 0u64);
    loop {
        let total = clusters.checked_add(blocks)?.checked_add(table)?;
        let needed = total.div_ceil(per_block);
        let needed_table = needed.div_ceil(per_table);
        if (needed, needed_table) == (blocks, table) {
            return blocks.checked_add(table);
        }
        (blocks, table) = (needed, needed_table);
    }
}
