//! The consistency pass: every entry of the BAT names a cluster that lies in the file, and no two name the same one.
//!
//! What is used is marked in a bitmap of the file's clusters. A file with more of them than the bitmap has bits is gone
//! through several times, each time for another window of it in which anything lies.

use crate::image::{Image, Place};
use crate::window::Window;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};
use instar_parallels_format::Header;

/// Clusters that are looked at in one go: 8 MiB of memory, and 64 TiB of the file with clusters of 1 MiB; less where the heap
/// is small …
const WINDOW: u64 = 1 << 26;
/// … but not less than this: 128 KiB of memory.
const LEAST_WINDOW: u64 = 1 << 20;

/// What the BAT says, all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Clusters of the disk that the image holds.
    pub held: u64,
    /// How many of the clusters that the image is said to have they are: only those of the disk, past whose end the last one
    /// may reach.
    pub units: u64,
    /// Entries behind those of the disk's clusters that say anything.
    pub beyond: u64,
    /// Clusters that do not follow the one of the cluster before, where that has one.
    pub fragmented: u64,
    /// Where the last cluster ends in the file; where the data begins if there is none.
    pub end: u64,
}

/// What is wrong with an image: a clause, and the byte of the file that it is about.
pub type Wrong<'a> = &'a mut dyn FnMut(u64, String) -> DriverResult<()>;

/// Clusters of the file of which some are used.
#[derive(Debug)]
pub struct SlotSet {
    window: Range<u64>,
    words: Vec<u64>,
}

impl SlotSet {
    /// None of those of a window.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn of(window: Range<u64>) -> DriverResult<Self> {
        let count = window.end.saturating_sub(window.start).div_ceil(64);
        Ok(Self { window, words: vec![0; usize::try_from(count).map_err(|_| overflow("a window of clusters"))?] })
    }

    /// Add one, if it lies in the window. `false` if it was there before.
    pub fn add(&mut self, slot: u64) -> bool {
        let index = slot.checked_sub(self.window.start).filter(|_| slot < self.window.end);
        let word = index.and_then(|index| usize::try_from(index / 64).ok()).and_then(|index| self.words.get_mut(index));
        let (Some(index), Some(word)) = (index, word) else { return true };
        let free = *word & 1 << (index % 64) == 0;
        *word |= 1 << (index % 64);
        free
    }

    /// The first one of the window, from `from` on, that is not in the set.
    pub fn first_free(&self, from: u64) -> Option<u64> {
        let is_free = |slot: &u64| {
            let index = slot.saturating_sub(self.window.start);
            let word = usize::try_from(index / 64).ok().and_then(|index| self.words.get(index));
            word.is_some_and(|word| word & 1 << (index % 64) == 0)
        };
        (from.max(self.window.start)..self.window.end).find(is_free)
    }
}

/// Hand each entry that is not 0 to `each`, with the cluster of the disk that it is for. What lies in a hole is not read.
///
/// # Errors
/// Those of `each`; I/O errors.
pub fn each_entry(
    io: &mut dyn BlockIo,
    image: &Image,
    each: &mut dyn FnMut(u64, u32) -> DriverResult<()>,
) -> DriverResult<()> {
    let mut window = Window::new(0);
    let (mut cluster, end) = (0, u64::from(image.header.entries));
    while cluster < end {
        let entry = window.get(io, image, cluster, end)?;
        if entry == 0 {
            cluster += window.zeroes(cluster);
            continue;
        }
        each(cluster, entry)?;
        cluster += 1;
    }
    Ok(())
}

/// Go through the BAT. What is wrong goes to `wrong`, which may end the pass.
///
/// # Errors
/// Those of `wrong`; I/O errors.
pub fn survey(io: &mut dyn BlockIo, image: &Image, wrong: Wrong<'_>) -> DriverResult<Survey> {
    // A bit for each cluster, and a quarter of the heap.
    let size = WINDOW.min((io.heap_free() as u64).saturating_mul(2)).max(LEAST_WINDOW);
    let slots = image.slots_in_file().max(1);
    let mut found = Survey { end: image.header.data_start(), ..Survey::default() };
    let mut reached = BTreeSet::from([0]);
    let mut next = Some(0);
    while let Some(index) = next {
        let start = index * size;
        let mut used = SlotSet::of(start..start.saturating_add(size).min(slots))?;
        let reached_now = (index == 0).then_some(&mut reached);
        let mut pass = Pass { image, size, before: None, found: &mut found, reached: reached_now };
        each_entry(io, image, &mut |cluster, entry| {
            let place = pass.entry(cluster, entry, wrong)?;
            if place.is_some_and(|place| !used.add(place.slot)) {
                let text = format!("cluster {cluster} of the disk lies in the same place as another one");
                wrong(Header::entry_place(cluster), text)?;
            }
            Ok(())
        })?;
        next = reached.range(index + 1..).next().copied();
    }
    Ok(found)
}

/// [`survey`] of an image in which nothing may be wrong.
///
/// # Errors
/// Corruption and I/O errors.
pub fn verified(io: &mut dyn BlockIo, image: &Image) -> DriverResult<Survey> {
    let found = survey(io, image, &mut |offset, text| Err(image.corrupt(offset, text)))?;
    match contradiction(image, &found) {
        Some(text) => Err(image.corrupt(0, text)),
        None => Ok(found),
    }
}

/// What header and BAT say that cannot both be. Programs disagree about such an image: QEMU does not look at the flag.
pub fn contradiction(image: &Image, found: &Survey) -> Option<String> {
    let clusters = found.held + found.beyond;
    (image.header.says_empty() && clusters > 0)
        .then(|| format!("flags say that the image is empty, and the BAT names {clusters} clusters"))
}

/// What is looked at in the first window's pass only.
struct Pass<'a> {
    image: &'a Image,
    /// Clusters of a window.
    size: u64,
    /// The cluster of the disk before, and where it ends in the file.
    before: Option<(u64, u64)>,
    found: &'a mut Survey,
    /// In the first window's pass only: the windows in which anything lies.
    reached: Option<&'a mut BTreeSet<u64>>,
}

impl Pass<'_> {
    fn entry(&mut self, cluster: u64, entry: u32, wrong: Wrong<'_>) -> DriverResult<Option<Place>> {
        let place = match (self.image.place(entry), &mut self.reached) {
            (Ok(place), Some(reached)) => {
                reached.insert(place.slot / self.size);
                place
            }
            (Ok(place), None) => return Ok(Some(place)),
            (Err(_), None) => return Ok(None),
            (Err(text), Some(_)) => {
                let text = format!("cluster {cluster} of the disk: {text}");
                return wrong(Header::entry_place(cluster), text).map(|()| None);
            }
        };
        let in_disk = cluster < self.image.header.disk_clusters();
        if in_disk {
            self.found.held += 1;
            self.found.units += self.image.units_of(cluster);
        } else {
            self.found.beyond += 1;
        }
        // As QEMU counts (`parallels_collect_statistics`): a cluster behind a gap begins anew.
        let follows = |(before, end): (u64, u64)| before + 1 != cluster || end == place.offset;
        self.found.fragmented += u64::from(!self.before.is_none_or(follows));
        let end = place.offset + self.image.header.cluster_bytes();
        self.before = Some((cluster, end));
        self.found.end = self.found.end.max(end);
        Ok(Some(place))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_set_knows_the_clusters_of_its_window() {
        let mut set = SlotSet::of(100..300).unwrap();
        assert!(set.add(5) && set.add(5), "not in the window");
        assert_eq!(set.first_free(0), Some(100));
        assert!(set.add(100) && set.add(101) && !set.add(101) && set.add(299) && set.add(300) && set.add(300));
        assert_eq!((set.first_free(100), set.first_free(200), set.first_free(299)), (Some(102), Some(200), None));
    }
}
