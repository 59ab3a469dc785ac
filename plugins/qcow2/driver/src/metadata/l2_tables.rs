//! All L2 tables of an image, each once, however many entries refer to it.
//!
//! Snapshots share most of their tables with each other and with the active state. Each table is read once here, and its
//! entries count as often as L1 entries refer to it, as in refcounts ("Host cluster management" in the specification).

use crate::image::{overflow, Image};
use crate::metadata::cluster_run::ClusterRun;
use crate::metadata::l2_entry::decode_entry;
use crate::metadata::reference::{Reference, Structure};
use crate::metadata::structures::{EachReference, Kinds, Structures};
use crate::metadata::table_reader::is_zero;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, Request};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Holes};
use instar_qcow2_format::{CompressedRange, HostOffset, L2Entry};

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

/// The L2 tables of the active state and of all snapshots, ascending.
pub(crate) struct L2Tables {
    all: Vec<L2Table>,
}

impl L2Tables {
    /// Look all L1 tables up. The L2 tables that they refer to lie in the file.
    ///
    /// # Errors
    /// Corruption of an L1 table; [`ErrorCode::ScratchTooSmall`] for more tables than memory holds; I/O errors.
    pub(crate) fn read(io: &mut dyn BlockIo, structures: &mut Structures<'_>) -> DriverResult<Self> {
        let image = structures.image();
        structures.snapshots(io)?;
        let most = io.heap_free() / 8 / size_of::<L2Table>();
        let mut all: Vec<L2Table> = Vec::new();
        // The tables of one L1 table after the other are merged with those before.
        let mut of = None;
        structures.visit(io, Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2, &mut |reference| {
            let snapshot = match reference.structure {
                Structure::InactiveL2(number) => Some(number),
                _ => None,
            };
            if all.len() >= most || of != snapshot {
                merge(&mut all);
            }
            if all.len() >= most {
                let text = "the image has too many L2 tables";
                return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(image.device, reference.at));
            }
            of = snapshot;
            all.push(L2Table { offset: reference.offset, times: 1 });
            Ok(())
        })?;
        merge(&mut all);
        Ok(Self { all })
    }

    /// The references to the tables themselves, ascending. Of those from L1 entries nothing but their number is left: they
    /// stand where the table does.
    pub(crate) fn references<'a>(&'a self, image: &'a Image) -> impl Iterator<Item = Reference> + 'a {
        self.all.iter().map(|table| {
            let whole = Reference::one(image, Structure::L2Table, table.offset, 1, table.offset.0);
            Reference { times: table.times, ..whole }
        })
    }

    /// Call `each` with what every entry refers to.
    ///
    /// # Errors
    /// Corruption of an entry; I/O errors; what `each` returns.
    pub(crate) fn each_entry(&self, io: &mut dyn BlockIo, image: &Image, each: EachReference<'_>) -> DriverResult<()> {
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
                    // Tables that follow each other in the file are one read.
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
                    if let Some((offset, run)) = clusters_of(image, entry) {
                        each(Reference { structure: Structure::GuestData(entry), offset, run, at, times })?;
                    }
                }
            }
        }
    }
}

/// Where that begins which an entry refers to, and the clusters that it touches.
fn clusters_of(image: &Image, entry: L2Entry) -> Option<(HostOffset, ClusterRun)> {
    let size = image.cluster_size();
    if image.data.is_some() {
        // They stand in another file, and nothing counts them.
        return None;
    }
    if let L2Entry::Compressed { descriptor } = entry {
        let range = CompressedRange::decode(descriptor, size);
        let start = size.host_cluster(range.offset);
        let last = size.host_cluster(HostOffset(range.end() - 1));
        return Some((range.offset, ClusterRun { start, count: last.0 - start.0 + 1 }));
    }
    entry.host().map(|(offset, _)| (offset, ClusterRun { start: size.host_cluster(offset), count: 1 }))
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
