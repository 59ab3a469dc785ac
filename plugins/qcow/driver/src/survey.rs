//! The consistency pass: every entry names something that lies in the file, and nothing but compressed clusters shares a
//! sector with anything else.
//!
//! What is used is marked in bitmaps of the file's sectors. A file with more sectors than a bitmap has bits is gone through
//! several times, each time for another window of it in which anything lies.

use crate::image::Image;
use crate::walk::{walk, Visitor};
use alloc::collections::BTreeSet;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::{overflow, BlockIo, DriverResult};
use instar_qcow_format::{Entry, SECTOR};

/// Sectors that are looked at in one go: two bitmaps of 4 MiB, for 16 GiB of the file; less where the heap is small …
const WINDOW: u64 = 1 << 25;
/// … but not less than this: two of 64 KiB.
const LEAST_WINDOW: u64 = 1 << 19;

/// What the tables say, all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Clusters of the disk that the image holds.
    pub held: u64,
    /// Of these, the compressed ones.
    pub compressed: u64,
    /// Of these, those that do not follow the cluster before in the file.
    pub fragmented: u64,
    /// Where the last thing that is used ends in the file; the last cluster may end behind the file's end.
    pub top: u64,
    /// Entries behind those of the disk's clusters that say anything.
    pub beyond: u64,
}

/// What is wrong with an image: a clause, and the byte of the file that it is about.
pub type Wrong<'a> = &'a mut dyn FnMut(u64, String) -> DriverResult<()>;

/// Sectors of which some are used.
#[derive(Debug)]
struct Sectors {
    window: Range<u64>,
    words: Vec<u64>,
}

impl Sectors {
    fn of(window: Range<u64>) -> DriverResult<Self> {
        let count = window.end.saturating_sub(window.start).div_ceil(64);
        Ok(Self { window, words: vec![0; usize::try_from(count).map_err(|_| overflow("a window of sectors"))?] })
    }

    /// Those of the window that these bytes of the file touch: the index of the word, and the bit.
    fn places(&self, bytes: &Range<u64>) -> impl Iterator<Item = (usize, u64)> {
        let start = self.window.start;
        let first = (bytes.start / SECTOR).max(start);
        let last = bytes.end.div_ceil(SECTOR).min(self.window.end);
        (first..last).filter_map(move |sector| {
            let index = sector - start;
            Some((usize::try_from(index / 64).ok()?, 1 << (index % 64)))
        })
    }

    fn add(&mut self, bytes: &Range<u64>) {
        for (index, bit) in self.places(bytes) {
            if let Some(word) = self.words.get_mut(index) {
                *word |= bit;
            }
        }
    }

    fn hold_any(&self, bytes: &Range<u64>) -> bool {
        self.places(bytes).any(|(index, bit)| self.words.get(index).is_some_and(|word| word & bit != 0))
    }
}

/// Go through the tables. What is wrong goes to `wrong`, which may end the pass.
///
/// # Errors
/// Those of `wrong`; I/O errors.
pub fn survey(io: &mut dyn BlockIo, image: &Image, wrong: Wrong<'_>) -> DriverResult<Survey> {
    let sectors = image.file_length.div_ceil(SECTOR).max(1);
    // Two bits for each sector, and a quarter of the heap.
    let room = WINDOW.min(io.heap_free() as u64).max(LEAST_WINDOW);
    let mut found = Survey { top: image.header.keep_end(), ..Survey::default() };
    let mut reached = BTreeSet::from([0]);
    let mut next = Some(0);
    while let Some(index) = next {
        let start = index * room;
        let window = start..start.saturating_add(room).min(sectors);
        let (whole, streams) = (Sectors::of(window.clone())?, Sectors::of(window)?);
        let is_first = index == 0;
        let reached_now = is_first.then_some(&mut reached);
        let mut pass =
            Pass { image, room, whole, streams, before: None, found: &mut found, reached: reached_now, wrong };
        walk(io, image, &mut pass)?;
        next = reached.range(index + 1..).next().copied();
    }
    Ok(found)
}

/// [`survey`] of an image in which nothing may be wrong.
///
/// # Errors
/// Corruption and I/O errors.
pub fn verified(io: &mut dyn BlockIo, image: &Image) -> DriverResult<Survey> {
    survey(io, image, &mut |offset, text| Err(image.corrupt(offset, text)))
}

struct Pass<'a, 'w> {
    image: &'a Image,
    /// Sectors of a window.
    room: u64,
    /// Sectors of the window that tables and plain clusters use.
    whole: Sectors,
    /// Sectors of the window in which compressed data lies.
    streams: Sectors,
    /// Where the cluster before ends in the file.
    before: Option<u64>,
    found: &'a mut Survey,
    /// In the first window's pass only: the windows in which anything lies.
    reached: Option<&'a mut BTreeSet<u64>>,
    wrong: Wrong<'w>,
}

impl Pass<'_, '_> {
    /// Count a use of the file, and mark it. `at` is where the entry stands.
    fn mark(&mut self, bytes: &Range<u64>, at: u64, is_stream: bool) -> DriverResult<bool> {
        if let Some(reached) = &mut self.reached {
            self.found.top = self.found.top.max(bytes.end);
            reached.extend([bytes.start, bytes.end - 1].map(|byte| byte / SECTOR / self.room));
        }
        let shared = self.whole.hold_any(bytes) || !is_stream && self.streams.hold_any(bytes);
        let marks = if is_stream { &mut self.streams } else { &mut self.whole };
        marks.add(bytes);
        if shared {
            let text = alloc::format!("an entry points to offset {}, which something else uses, too", bytes.start);
            (self.wrong)(at, text)?;
        }
        Ok(!shared)
    }

    /// Tell what is wrong, once: each window's pass sees it.
    fn tell(&mut self, at: u64, text: &str) -> DriverResult<()> {
        match self.reached {
            Some(_) => (self.wrong)(at, text.to_string()),
            None => Ok(()),
        }
    }
}

impl Visitor for Pass<'_, '_> {
    fn table(&mut self, number: u64, at: u64) -> DriverResult<Option<u64>> {
        match self.image.table(number) {
            Ok(table) => {
                let bytes = table..table.saturating_add(self.image.header.table_bytes());
                Ok(self.mark(&bytes, at, false)?.then_some(table))
            }
            Err(text) => self.tell(at, &text).map(|()| None),
        }
    }

    fn entry(&mut self, cluster: u64, number: u64, at: u64) -> DriverResult<()> {
        let in_disk = cluster < self.image.disk_clusters();
        let entry = match self.image.entry(number) {
            Ok(entry) => entry,
            Err(text) => return self.tell(at, &text),
        };
        let (bytes, is_stream) = match entry {
            Entry::Free => return Ok(()),
            Entry::Data(offset) => (offset..offset.saturating_add(self.image.header.cluster_size()), false),
            Entry::Compressed { offset, length } => (offset..offset.saturating_add(length), true),
        };
        if self.reached.is_some() {
            *(if in_disk { &mut self.found.held } else { &mut self.found.beyond }) += 1;
            self.found.compressed += u64::from(in_disk && is_stream);
            self.found.fragmented += u64::from(self.before.is_some_and(|before| before != bytes.start));
            self.before = Some(bytes.end);
        }
        self.mark(&bytes, at, is_stream).map(|_| ())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_set_knows_the_sectors_of_its_window() {
        let mut set = Sectors::of(100..300).unwrap();
        set.add(&(0..512));
        assert!(!set.hold_any(&(0..100 * 512)) && !set.hold_any(&(0..u64::MAX)));
        set.add(&(100 * 512 + 3..100 * 512 + 4));
        set.add(&(299 * 512..400 * 512));
        assert!(set.hold_any(&(0..100 * 512 + 1)) && !set.hold_any(&(101 * 512..299 * 512)));
        assert!(set.hold_any(&(298 * 512..299 * 512 + 1)) && !set.hold_any(&(300 * 512..400 * 512)));
    }
}
