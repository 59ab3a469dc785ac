//! Where new clusters go: to places in the file that nothing uses, from the lowest on, as QEMU does (`allocate_clusters`).
//!
//! Such gaps are what discards leave, and crashes: some of the entries that a run has written are there, and others are not.
//! As they are filled first, running the commit again takes back what an interrupted run lost.

use crate::image::Image;
use crate::survey::{each_entry, SlotSet, Survey};
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_parallels_format::Header;

/// Places among which gaps are looked for at once: 1 MiB of memory. For each such window that has gaps, the BAT is read.
const WINDOW: u64 = 1 << 23;

/// The places of clusters in the file, counted from where the data began when the image was opened.
#[derive(Debug)]
pub struct Slots {
    origin: u64,
    cluster: u64,
    /// One more than the highest that is used, or was given out.
    top: u64,
    /// Gaps below the first top that were not given out …
    gaps: u64,
    /// … and from where on they lie.
    from: u64,
    window: Option<(u64, SlotSet)>,
}

impl Slots {
    /// Those that the BAT leaves.
    pub fn new(header: &Header, survey: &Survey) -> Self {
        let (origin, cluster) = (header.data_start(), header.cluster_bytes());
        let top = survey.end.saturating_sub(origin) / cluster;
        let gaps = top.saturating_sub(survey.held + survey.beyond);
        Self { origin, cluster, top, gaps, from: 0, window: None }
    }

    /// Where the file ends after so many more were given out, if there are none in front of byte `start`, where `start` is
    /// not 0. `None` behind the end of every file.
    pub fn end_after(&self, more: u64, start: u64) -> Option<u64> {
        let (top, gaps) = if start > 0 { (self.top.max(self.number(start)), 0) } else { (self.top, self.gaps) };
        let top = top.checked_add(more.saturating_sub(gaps))?;
        top.checked_mul(self.cluster)?.checked_add(self.origin).filter(|&end| end <= i64::MAX as u64)
    }

    fn number(&self, offset: u64) -> u64 {
        offset.saturating_sub(self.origin).div_ceil(self.cluster)
    }

    /// The byte of the file at which one of them begins that is used, given out, or next.
    fn offset(&self, number: u64) -> u64 {
        self.origin.saturating_add(number.saturating_mul(self.cluster))
    }

    /// Where the highest one that is used or was given out ends in the file.
    pub fn end(&self) -> u64 {
        self.offset(self.top)
    }

    /// Give out none in front of byte `start` of the file any more, and fill no gaps.
    pub fn skip_to(&mut self, start: u64) {
        self.top = self.top.max(self.number(start));
        self.gaps = 0;
    }

    /// Give out the lowest one that nothing uses: the byte of the file at which it begins.
    ///
    /// # Errors
    /// [`ErrorCode::NoSpace`] where no entry or file reaches; I/O errors.
    pub fn take(&mut self, io: &mut dyn BlockIo, image: &Image) -> DriverResult<u64> {
        while self.gaps > 0 && self.from < self.top {
            let start = self.from - self.from % WINDOW;
            if self.window.as_ref().is_none_or(|(first, _)| *first != start) {
                self.window = Some((start, self.used(io, image, start)?));
            }
            let Some(gap) = self.window.as_ref().and_then(|(_, used)| used.first_free(self.from)) else {
                self.from = start + WINDOW;
                continue;
            };
            self.gaps -= 1;
            self.from = gap + 1;
            return Ok(self.offset(gap));
        }
        self.window = None;
        let offset = self.end();
        if self.end_after(1, 0).is_none() || image.header.entry(offset).is_none() {
            let text = "the next cluster would lie further in the file than an entry of the BAT can say";
            return Err(DriverError::new(ErrorCode::NoSpace, text).at(image.device, offset));
        }
        self.top += 1;
        Ok(offset)
    }

    /// Those of a window that the BAT in the file names. What was given out since lies in front of where gaps are looked for.
    fn used(&self, io: &mut dyn BlockIo, image: &Image, start: u64) -> DriverResult<SlotSet> {
        let mut used = SlotSet::of(start..self.top.min(start.saturating_add(WINDOW)))?;
        each_entry(io, image, &mut |_, entry| {
            used.add(self.number(image.header.offset(entry)));
            Ok(())
        })?;
        Ok(used)
    }
}
