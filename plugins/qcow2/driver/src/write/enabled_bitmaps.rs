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
use crate::metadata::bitmap_directory::{refusal, BitmapDirectory, DirectoryEntry};
use crate::metadata::cluster_run::ClusterRun;
use crate::metadata::map::refuse_overlaps;
use crate::metadata::slice_cache::SliceCache;
use crate::metadata::structures::{Kinds, Structures};
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

/// The bitmaps of an image that have to be kept up.
pub struct EnabledBitmaps {
    /// Those that have to be kept up.
    pub recorded: Vec<Recorded>,
    /// The last table entry of each that planning looked at.
    pub last_planned: Vec<Option<u64>>,
    /// Slices of their tables.
    pub tables: SliceCache,
    /// Slices of their data.
    pub data: SliceCache,
}

impl EnabledBitmaps {
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

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.recorded.is_empty()
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
        let mut ranges = Ranges::new(io);
        let directory = BitmapDirectory::read(io, image, &mut |entry| check_bitmap(image, entry))?;
        let bitmaps: Vec<Bitmap> = directory.entries.iter().map(|entry| entry.bitmap).collect();
        let mut structures = Structures::with_bitmaps(image, directory);
        structures.visit(io, Kinds::BITMAP_TABLES, &mut |reference| ranges.push(reference.run))?;
        // Tables that overlap are refused before they are read, so that no more is read than the file has.
        let mut tables = ranges.all.clone();
        tables.sort_unstable();
        refuse_overlaps(image, &tables)?;
        drop(tables);
        check_refcounts(io, image, refcounts, &ranges.all, false)?;
        for (number, bitmap) in bitmaps.iter().enumerate() {
            let first = ranges.all.len();
            structures.visit_bitmap_data(io, number, &mut |reference| ranges.push(reference.run))?;
            let data = ranges.all.get(first..).unwrap_or_default();
            check_refcounts(io, image, refcounts, data, bitmap.is_recording())?;
            if bitmap.is_recording() {
                let table = ClusterRun::of(image.cluster_size(), bitmap.table, bitmap.table_bytes());
                check_refcounts(io, image, refcounts, &[range_of(table)], true)?;
                let entries = u64::from(bitmap.table_entries);
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

/// First and last cluster of a run, which is not empty.
fn range_of(run: ClusterRun) -> ClusterRange {
    (run.start.0, run.end() - 1)
}

/// Collects ranges of clusters, in bounded memory.
struct Ranges {
    all: Vec<ClusterRange>,
    room: usize,
}

impl Ranges {
    fn new(io: &dyn BlockIo) -> Self {
        Self { all: Vec::new(), room: io.heap_free() / 16 / core::mem::size_of::<ClusterRange>() }
    }

    fn push(&mut self, run: ClusterRun) -> DriverResult<()> {
        if self.all.len() >= self.room {
            return Err(too_many());
        }
        self.all.push(range_of(run));
        Ok(())
    }
}

/// What an entry of the directory says, against the image.
fn check_bitmap(image: &Image, entry: &DirectoryEntry) -> DriverResult<()> {
    let (bitmap, at) = (&entry.bitmap, entry.at);
    // The size of one that was not saved may be that of another time ("Bitmap directory", `in_use`).
    if !bitmap.in_use && bitmap.coverage(image.cluster_size()) < image.header.virtual_size {
        let text = format!("{}has a table of {} entries, too few for the disk", entry.what(), bitmap.table_entries);
        return Err(image.corrupt(at, text));
    }
    if bitmap.is_recording() && bitmap.extra_data_bytes != 0 && !bitmap.extra_data_compatible {
        let text = format!("{}is enabled, and has extra data that nothing is known of", entry.what());
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
