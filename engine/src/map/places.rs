//! The files of a chain in which the runs of a map are stored.

use crate::devices::Devices;
use crate::image::ChainImage;
use crate::plugins::FileImage;
use instar_guest_abi::{ExtentKind, FIRST_FILE_DEVICE};
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Runs that one entry of a table can stand for: the subclusters of a qcow2 cluster, and what is between two such.
const RUNS_PER_ENTRY: u64 = 33;
/// Bytes of messages that a run can take, at most.
const RUN_BYTES: u64 = 64;
/// An entry takes four bytes of a file at least.
const ENTRY_BYTES: u64 = 4;

/// The meaning of a hole in a file for plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoleMeaning {
    /// Nothing: the format does not leave any, so that they are not looked for.
    Ignored,
    /// The data reads as zeroes.
    Zero,
    /// There is no data: the file is the disk.
    Absent,
}

/// A file of a chain, as runs are placed in it.
#[derive(Clone, Debug)]
pub struct Place {
    /// The layer that it belongs to; 0 is the top-most.
    pub depth: u32,
    /// Its path.
    pub path: PathBuf,
    /// The meaning of holes in it.
    pub holes: HoleMeaning,
}

/// Collect the files of these layers by their device numbers.
#[must_use]
pub fn places(layers: &[&ChainImage<'_>]) -> BTreeMap<u32, Place> {
    let mut places = BTreeMap::new();
    let mut next_file = FIRST_FILE_DEVICE;
    for (depth, image) in (0..).zip(layers) {
        let unit = image.facts.cluster_size;
        let is_disk = unit <= 1;
        let whole = if is_disk { HoleMeaning::Absent } else { holes_of(&image.opened.file, unit) };
        places.insert(depth, Place { depth, path: image.opened.path.clone(), holes: whole });
        for file in &image.files {
            // One with a fixed place for every byte may be sparse, like a disk.
            let holes = if file.plain { HoleMeaning::Zero } else { holes_of(&file.opened.file, unit) };
            places.insert(next_file, Place { depth, path: file.opened.path.clone(), holes });
            next_file += 1;
        }
    }
    places
}

/// Whether a file with clusters has holes where it says that it has data: because its metadata was preallocated, or it
/// was copied by a tool that leaves zeroes out. Then it takes clearly less space than it is long.
fn holes_of(file: &FileImage, unit: u64) -> HoleMeaning {
    let Ok(metadata) = file.file().metadata() else { return HoleMeaning::Ignored };
    let (real, long) = (metadata.blocks().saturating_mul(512) / unit, metadata.len().div_ceil(unit));
    if metadata.is_file() && long >= (real.saturating_mul(10) / 9).max(real.saturating_add(2)) {
        HoleMeaning::Zero
    } else {
        HoleMeaning::Ignored
    }
}

/// Whether a guest may say that a run of `length` bytes comes from there: the layer with this slot, a number for a kind of extent,
/// and, of plain data, a device and the byte offset on it.
#[must_use]
pub fn is_plausible(
    places: &BTreeMap<u32, Place>,
    slot: u32,
    kind: u32,
    (device, offset): (u32, u64),
    length: u64,
) -> bool {
    match ExtentKind::from_u32(kind) {
        Some(ExtentKind::Data) => {
            let place = places.get(&device);
            place.is_some_and(|place| place.depth == slot) && offset.checked_add(length).is_some()
        }
        Some(ExtentKind::Zero | ExtentKind::Encoded) => true,
        Some(ExtentKind::Memory) => false,
        None => kind == 0,
    }
}

/// How many runs a map of these layers can have: no image has more than entries, and each layer may cut those of the others.
#[must_use]
pub fn most_runs(layers: &[&ChainImage<'_>]) -> u64 {
    let length = layers.iter().map(|layer| layer.length()).fold(0, u64::saturating_add);
    // What a small file says, it may say: an overlay without any table has holes of its own.
    (length / ENTRY_BYTES).saturating_mul(2 * RUNS_PER_ENTRY).saturating_add(1 << 18)
}

/// Return the bytes of messages that a map of `runs` runs can take.
#[must_use]
pub fn message_limit(runs: u64) -> u64 {
    runs.saturating_mul(RUN_BYTES).saturating_add(16 << 20)
}

/// Plain data of a device, cut where the file has holes that mean something: the parts in order, and whether each is a hole.
pub fn cut_at_holes<'d>(
    devices: &'d Devices,
    number: u32,
    holes: HoleMeaning,
    data: Range<u64>,
) -> impl Iterator<Item = (Range<u64>, bool)> + 'd {
    let mut at = data.start;
    let next = move || {
        if at >= data.end {
            return None;
        }
        let (begin, end) = match devices.device(number) {
            Some(device) if holes != HoleMeaning::Ignored => device.next_data(at, data.end),
            _ => (at, data.end),
        };
        let hole = at..begin.clamp(at, data.end);
        let part = begin.max(at)..end.clamp(begin.max(at), data.end);
        at = part.end.max(at + 1);
        Some([(hole, true), (part, false)])
    };
    std::iter::from_fn(next).flatten().filter(|(part, _)| !part.is_empty())
}
