//! The files of a chain, as the runs of a map are placed in them.

use crate::image::ChainImage;
use crate::plugins::FileImage;
use instar_guest_abi::FIRST_FILE_DEVICE;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// What a hole in a file means for plain data in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
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
    /// What holes in it mean.
    pub holes: Holes,
}

/// The files of these layers by the numbers that they get as devices.
#[must_use]
pub fn places(layers: &[&ChainImage<'_>]) -> BTreeMap<u32, Place> {
    let mut places = BTreeMap::new();
    let mut next_file = FIRST_FILE_DEVICE;
    for (depth, image) in (0..).zip(layers) {
        let unit = image.facts.cluster_size;
        let is_disk = unit <= 1;
        let whole = if is_disk { Holes::Absent } else { holes_of(&image.opened.file, unit) };
        places.insert(depth, Place { depth, path: image.opened.path.clone(), holes: whole });
        for file in &image.files {
            // A file that never grows has a fixed place for every byte: like a disk, it may be sparse.
            let holes = if file.grows { holes_of(&file.opened.file, unit) } else { Holes::Zero };
            places.insert(next_file, Place { depth, path: file.opened.path.clone(), holes });
            next_file += 1;
        }
    }
    places
}

/// Whether a file with clusters has holes where it says that it has data: because its metadata was preallocated, or it
/// was copied by a tool that leaves zeroes out. Then it takes clearly less space than it is long.
fn holes_of(file: &FileImage, unit: u64) -> Holes {
    let Ok(metadata) = file.file().metadata() else { return Holes::Ignored };
    let (real, long) = (metadata.blocks().saturating_mul(512) / unit, metadata.len().div_ceil(unit));
    if metadata.is_file() && long >= (real.saturating_mul(10) / 9).max(real.saturating_add(2)) {
        Holes::Zero
    } else {
        Holes::Ignored
    }
}
