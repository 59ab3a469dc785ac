//! The consistency pass: every entry names something that lies in the file, and nothing but compressed clusters shares a
//! sector with anything else.
//!
//! What is used is marked in bitmaps of the file's sectors, a [window](Windows) of it at a time.

use crate::image::Image;
use crate::walk::{walk, Visitor};
use alloc::string::ToString;
use core::ops::Range;
use instar_guest_sdk::table::{Used, Windows, Wrong};
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow_format::{Entry, SECTOR};

/// What the tables say, all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Clusters of the disk that the image holds.
    pub held: u64,
    /// Of these, the compressed ones.
    pub compressed: u64,
    /// Of these, those that do not follow the cluster before in the file.
    pub fragmented: u64,
    /// Where the last thing that is used ends in the file.
    pub top: u64,
    /// Entries behind those of the disk's clusters that say anything.
    pub beyond: u64,
}

/// Go through the tables. What is wrong goes to `wrong`, which may end the pass.
///
/// # Errors
/// Those of `wrong`; I/O errors.
pub fn survey(io: &mut dyn BlockIo, image: &Image, wrong: Wrong<'_>) -> DriverResult<Survey> {
    let mut found = Survey { top: image.header.keep_end(), ..Survey::default() };
    let mut windows = Windows::over(io, image.file_length.div_ceil(SECTOR), 2);
    while let Some(window) = windows.next_window() {
        let (whole, streams) = (Used::of(window.clone())?, Used::of(window)?);
        let mut pass = Pass { image, windows: &mut windows, whole, streams, before: None, found: &mut found, wrong };
        walk(io, image, &mut pass)?;
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
    windows: &'a mut Windows,
    /// Sectors of the window that tables and plain clusters use.
    whole: Used,
    /// Sectors of the window in which compressed data lies.
    streams: Used,
    /// Where the cluster before ends in the file.
    before: Option<u64>,
    found: &'a mut Survey,
    wrong: Wrong<'w>,
}

impl Pass<'_, '_> {
    /// Count a use of the file, and mark it. `at` is where the entry stands.
    fn mark(&mut self, bytes: &Range<u64>, at: u64, is_stream: bool) -> DriverResult<bool> {
        let sectors = bytes.start / SECTOR..bytes.end.div_ceil(SECTOR);
        self.found.top = self.found.top.max(bytes.end);
        self.windows.reach(&sectors);
        let shared = self.whole.has_any(&sectors) || !is_stream && self.streams.has_any(&sectors);
        let marks = if is_stream { &mut self.streams } else { &mut self.whole };
        marks.add_all(&sectors);
        if shared {
            let text = alloc::format!("an entry points to offset {}, which something else uses, too", bytes.start);
            (self.wrong)(at, text)?;
        }
        Ok(!shared)
    }

    /// Tell what is wrong, once: each window's pass sees it.
    fn tell(&mut self, at: u64, text: &str) -> DriverResult<()> {
        if self.windows.is_first() {
            (self.wrong)(at, text.to_string())?;
        }
        Ok(())
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
        if self.windows.is_first() {
            *(if in_disk { &mut self.found.held } else { &mut self.found.beyond }) += 1;
            self.found.compressed += u64::from(in_disk && is_stream);
            self.found.fragmented += u64::from(self.before.is_some_and(|before| before != bytes.start));
            self.before = Some(bytes.end);
        }
        self.mark(&bytes, at, is_stream).map(|_| ())
    }
}
