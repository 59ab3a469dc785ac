//! All L2 tables of an image, each once, whoever refers to it.
//!
//! Snapshots share most of their tables with each other and with the active state. Each table is read once here, and its
//! entries count as often as L1 entries refer to it, as in refcounts ("Host cluster management" in the specification).

use crate::image::{overflow, Image};
use crate::metadata::entries::scan_l1_at;
use crate::metadata::l2_entry::decode_entry;
use crate::metadata::snapshot_table::SnapshotTable;
use crate::metadata::table_reader::is_zero;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, Request};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Holes};
use instar_qcow2_format::{CompressedRange, HostCluster, HostOffset, L2Entry};

/// Bytes of tables that are read at once.
const WINDOW: u64 = 2 << 20;
/// An L2 table is read in slices of at most this many bytes.
const SLICE: u64 = 64 << 10;

/// An L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct L2Table {
    /// Where it begins.
    pub(crate) offset: HostOffset,
    /// How many L1 entries refer to it.
    pub(crate) times: u32,
}

/// An entry of an L2 table that refers to something in the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Referring {
    /// Where it stands in the file, in bytes.
    pub(crate) at: u64,
    pub(crate) entry: L2Entry,
    /// How many L1 entries refer to its table.
    pub(crate) times: u32,
}

impl Referring {
    /// Verify that everything the entry refers to lies in the file.
    ///
    /// # Errors
    /// Corruption.
    pub(crate) fn verify_bounds(&self, image: &Image) -> DriverResult<()> {
        let past = |offset: HostOffset| {
            image.corrupt(self.at, format!("an L2 entry points to offset {offset}, past the end of the file: it is damaged, or the file is cut off"))
        };
        if let L2Entry::Compressed { descriptor } = self.entry {
            let range = CompressedRange::decode(descriptor, image.cluster_size());
            // Only its last sector may be cut off.
            if !image.holds_bytes(range.last_sector(), 1) {
                return Err(past(range.offset));
            }
        }
        match self.entry.host() {
            Some((offset, _)) if !image.holds_cluster(offset) => Err(past(offset)),
            _ => Ok(()),
        }
    }

    /// Call `each` with every host cluster that the entry refers to, wherever it is.
    ///
    /// # Errors
    /// What `each` returns.
    pub(crate) fn each_cluster(
        &self,
        image: &Image,
        each: &mut dyn FnMut(HostCluster) -> DriverResult<()>,
    ) -> DriverResult<()> {
        let size = image.cluster_size();
        if let L2Entry::Compressed { descriptor } = self.entry {
            CompressedRange::decode(descriptor, size).host_clusters(size).try_for_each(&mut *each)?;
        }
        self.entry.host().map_or(Ok(()), |(offset, _)| each(size.host_cluster(offset)))
    }
}

/// The L2 tables of the active state and of all snapshots, ascending.
pub(crate) struct L2Tables {
    all: Vec<L2Table>,
}

impl L2Tables {
    /// Look all L1 tables up; `snapshots` are those of the image. The tables that they refer to lie in the file.
    ///
    /// # Errors
    /// Corruption of an L1 table; [`ErrorCode::ScratchTooSmall`] for more tables than memory holds; I/O errors.
    pub(crate) fn read(io: &mut dyn BlockIo, image: &Image, snapshots: &SnapshotTable) -> DriverResult<Self> {
        let most = io.heap_free() / 8 / size_of::<L2Table>();
        let mut all: Vec<L2Table> = Vec::new();
        let active = (image.header.l1_table, image.header.l1_entries);
        let of_snapshots = snapshots.entries.iter().map(|snapshot| (snapshot.l1_table, snapshot.l1_entries));
        for (l1, entries) in core::iter::once(active).chain(of_snapshots) {
            scan_l1_at(io, image, l1, u64::from(entries), &mut |_, _, offset| {
                if all.len() >= most {
                    merge(&mut all);
                }
                if all.len() >= most {
                    let text = "the image has too many L2 tables";
                    return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(image.device, l1.0));
                }
                all.push(L2Table { offset, times: 1 });
                Ok(())
            })?;
            merge(&mut all);
        }
        Ok(Self { all })
    }

    /// The tables, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &L2Table> {
        self.all.iter()
    }

    /// Call `each` with every entry that refers to a cluster.
    ///
    /// # Errors
    /// Corruption of an entry; I/O errors; what `each` returns.
    pub(crate) fn each_entry(
        &self,
        io: &mut dyn BlockIo,
        image: &Image,
        each: &mut dyn FnMut(Referring) -> DriverResult<()>,
    ) -> DriverResult<()> {
        let bytes = image.cluster_size().bytes();
        let slice = bytes.min(SLICE);
        let width = image.header.l2_entry_bytes();
        let step = usize::try_from(width).map_err(|_| overflow("the size of an L2 entry"))?;
        let at_once = usize::try_from(WINDOW / slice).map_err(|_| overflow("the size of a slice"))?;
        let mut slices = self
            .all
            .iter()
            .flat_map(|table| (0..bytes / slice).map(move |index| (table.offset.0 + index * slice, table.times)));
        let slice_size = usize::try_from(slice).map_err(|_| overflow("the size of a slice"))?;
        let mut buffer: Vec<u8> = Vec::new();
        // Once a slice held nothing, those in holes are not read.
        let mut holes: Option<Holes> = None;
        loop {
            let mut batch: Vec<(u64, u32)> = slices.by_ref().take(at_once).collect();
            if batch.is_empty() {
                return Ok(());
            }
            if let Some(holes) = &mut holes {
                let ranges: Vec<_> = batch.iter().map(|&(at, _)| at..at + slice).collect();
                let mut data = holes.hold_data(io, image.device, &ranges)?.into_iter();
                batch.retain(|_| data.next().unwrap_or(true));
            }
            if batch.is_empty() {
                continue;
            }
            buffer.resize(buffer.len().max(batch.len() * slice_size), 0);
            let base = buffer.as_mut_ptr() as u64;
            let mut requests: Vec<Request> = Vec::new();
            for (address, &(at, _)) in (base..).step_by(slice_size).zip(&batch) {
                match requests.last_mut() {
                    // L2Tables that follow each other in the file are one read.
                    Some(last) if last.offset + last.length == at => last.length += slice,
                    _ => requests.push(Request::read(image.device, at, address, slice)),
                }
            }
            io.run(&mut requests)?;
            for (bytes, &(first, times)) in buffer.chunks_exact(slice_size).zip(&batch) {
                if is_zero(bytes) {
                    holes.get_or_insert_default();
                    continue;
                }
                for (index, raw) in (0u64..).zip(bytes.chunks_exact(step)) {
                    // Most tables are sparse.
                    if raw.iter().all(|&byte| byte == 0) {
                        continue;
                    }
                    let at = first + index * width;
                    let (entry, _) =
                        decode_entry(image, raw).map_err(|error| image.corrupt(at, format!("an L2 entry {error}")))?;
                    if entry.host().is_some() || matches!(entry, L2Entry::Compressed { .. }) {
                        each(Referring { at, entry, times })?;
                    }
                }
            }
        }
    }
}

/// Sort tables, and make one of those that are the same.
fn merge(all: &mut Vec<L2Table>) {
    all.sort_unstable();
    all.dedup_by(|again, first| {
        let same = again.offset == first.offset;
        if same {
            first.times = first.times.saturating_add(again.times);
        }
        same
    });
}
