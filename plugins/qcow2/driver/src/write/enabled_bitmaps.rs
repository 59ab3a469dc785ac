//! The persistent bitmaps of a backing: which ones a commit has to keep up, and which clusters they have.
//!
//! Bitmaps count only while the autoclear bit says so ("Header", `autoclear_features`). Without it they are stale: their
//! clusters are left alone (they keep their refcounts), and the bit stays clear. With it:
//!
//! * an enabled bitmap (`auto`) must reflect every change: see [`record_bits`](crate::write::record_bits);
//! * a disabled one, and one that was not saved (`in_use`), stays as it is.
//!
//! The clusters of all of them are metadata: no data may be there, and refcounts must agree.

use crate::image::Image;
use crate::metadata::bitmap_directory::{find_directory, read_directory, refusal};
use crate::metadata::entries::scan_bitmap_table;
use crate::metadata::map::refuse_overlaps;
use crate::metadata::slice_cache::SliceCache;
use crate::refcount::blocks::{Refcounts, CLUSTERS_PER_LOAD};
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{Bitmap, BitmapError, HostCluster, HostOffset};

/// First and last cluster of a structure.
pub type ClusterRange = (u64, u64);

/// A bitmap that has to be kept up.
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    /// Where its table begins.
    pub table: HostOffset,
    /// Entries of that table …
    pub entries: u64,
    /// … and how many of them it has already: fewer while the image is about to grow. The others are 0.
    pub held: u64,
    /// log2 of its granularity in bytes.
    pub granularity_bits: u32,
}

/// The bitmaps of an image.
pub struct Bitmaps {
    /// Those that have to be kept up.
    pub recorded: Vec<Recorded>,
    /// The last table entry of each that planning looked at.
    pub last_planned: Vec<Option<u64>>,
    /// Slices of their tables.
    pub tables: SliceCache,
    /// Slices of their data.
    pub data: SliceCache,
}

impl Bitmaps {
    /// No bitmaps.
    #[must_use]
    pub fn new(image: &Image) -> Self {
        let size = image.slice_size();
        Self {
            recorded: Vec::new(),
            last_planned: Vec::new(),
            tables: SliceCache::new(image.device, size),
            data: SliceCache::new(image.device, size),
        }
    }

    /// Read the directory and all tables, and verify them. Returns the clusters of all bitmaps, too.
    ///
    /// # Errors
    /// Corruption of a structure or of its refcounts; [`ErrorCode::UnsupportedFormat`] for what the specification does
    /// not know; [`ErrorCode::ScratchTooSmall`]; I/O errors.
    pub fn load(
        io: &mut dyn BlockIo,
        image: &Image,
        refcounts: &mut Refcounts,
    ) -> DriverResult<(Self, Vec<ClusterRange>)> {
        let mut found = Self::new(image);
        let Some(directory) = find_directory(image)? else {
            return Ok((found, Vec::new()));
        };
        let mut ranges = Ranges::new(io, image);
        ranges.push(HostOffset(directory.directory_offset), directory.directory_size)?;
        let mut bitmaps = Vec::new();
        read_directory(io, image, directory, &mut |at, what, bitmap| {
            check_bitmap(image, &bitmap, at, what)?;
            ranges.push(bitmap.table, bitmap.table_bytes())?;
            bitmaps.push(bitmap);
            Ok(())
        })?;
        // L2Tables that overlap are refused before they are read, so that no more is read than the file has.
        let mut tables = ranges.all.clone();
        tables.sort_unstable();
        refuse_overlaps(image, &tables)?;
        drop(tables);
        check_refcounts(io, image, refcounts, &ranges.all, false)?;
        for bitmap in &bitmaps {
            let first = ranges.all.len();
            let entries = u64::from(bitmap.table_entries);
            scan_bitmap_table(io, image, bitmap.table, entries, &mut |cluster| {
                ranges.push(cluster, image.cluster_size().bytes())
            })?;
            let data = ranges.all.get(first..).unwrap_or_default();
            check_refcounts(io, image, refcounts, data, bitmap.is_recording())?;
            if bitmap.is_recording() {
                let mut table = Ranges { all: Vec::new(), ..ranges };
                table.push(bitmap.table, bitmap.table_bytes())?;
                check_refcounts(io, image, refcounts, &table.all, true)?;
                found.recorded.push(Recorded {
                    table: bitmap.table,
                    entries,
                    held: entries,
                    granularity_bits: bitmap.granularity_bits,
                });
                found.last_planned.push(None);
            }
        }
        Ok((found, ranges.all))
    }
}

fn too_many() -> DriverError {
    DriverError::new(ErrorCode::ScratchTooSmall, "the image has too many bitmaps, or too many clusters in them")
}

/// Collects ranges of clusters, in bounded memory.
struct Ranges<'a> {
    all: Vec<ClusterRange>,
    room: usize,
    image: &'a Image,
}

impl<'a> Ranges<'a> {
    fn new(io: &dyn BlockIo, image: &'a Image) -> Self {
        Self { all: Vec::new(), room: io.heap_free() / 16 / core::mem::size_of::<ClusterRange>(), image }
    }

    /// Add the clusters of `bytes` bytes from `offset` on, which lie in the file.
    fn push(&mut self, offset: HostOffset, bytes: u64) -> DriverResult<()> {
        let size = self.image.cluster_size();
        let first = size.host_cluster(offset).0;
        let last = first + size.count_for(bytes).max(1) - 1;
        if self.all.len() >= self.room {
            return Err(too_many());
        }
        self.all.push((first, last));
        Ok(())
    }
}

/// What an entry of the directory says, against the image. `at` is where the entry stands.
fn check_bitmap(image: &Image, bitmap: &Bitmap, at: u64, what: &str) -> DriverResult<()> {
    // The size of one that was not saved may be that of another time ("Bitmap directory", `in_use`).
    if !bitmap.in_use && bitmap.coverage(image.cluster_size()) < image.header.virtual_size {
        let text = format!("{what}has a table of {} entries, too few for the disk", bitmap.table_entries);
        return Err(image.corrupt(at, text));
    }
    if bitmap.is_recording() && bitmap.extra_data_bytes != 0 && !bitmap.extra_data_compatible {
        let text = format!("{what}is enabled, and has extra data that nothing is known of");
        return Err(refusal(image, at, "", BitmapError::Unsupported(text)));
    }
    Ok(())
}

/// Clusters of bitmaps must be in use; those that are `written` to must have no other owner.
fn check_refcounts(
    io: &mut dyn BlockIo,
    image: &Image,
    refcounts: &mut Refcounts,
    ranges: &[ClusterRange],
    written: bool,
) -> DriverResult<()> {
    let mut clusters = ranges.iter().flat_map(|&(first, last)| (first..=last).map(HostCluster));
    loop {
        let batch: Vec<HostCluster> = clusters.by_ref().take(CLUSTERS_PER_LOAD).collect();
        if batch.is_empty() {
            return Ok(());
        }
        refcounts.table.shrink(CLUSTERS_PER_LOAD);
        refcounts.blocks.shrink(CLUSTERS_PER_LOAD / 16);
        refcounts.load(io, image, batch.iter().copied())?;
        for cluster in batch {
            let count = refcounts.get(image, cluster)?;
            if count == 0 || (written && count != 1) {
                let offset = image.cluster_size().host_offset(cluster).unwrap_or_default();
                let text = format!("the cluster at offset {offset}, which belongs to a bitmap, has refcount {count}");
                return Err(image.corrupt(offset.0, text));
            }
        }
    }
}
