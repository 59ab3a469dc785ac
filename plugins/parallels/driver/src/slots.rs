//! Where new clusters go: to places in the file that nothing uses, from the lowest on, as QEMU does (`allocate_clusters`).
//!
//! Such gaps are what discards leave, and crashes: some of the entries that a run has written are there, and others are not.
//! As they are filled first, running the commit again takes back what an interrupted run lost.

use crate::image::Image;
use crate::survey::{each_entry, Survey};
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::table;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_parallels_format::Header;

/// The places of clusters in the file, counted from where the data began when the image was opened.
#[derive(Clone, Copy, Debug)]
struct Places {
    origin: u64,
    cluster: u64,
}

impl Places {
    fn number(self, offset: u64) -> u64 {
        offset.saturating_sub(self.origin).div_ceil(self.cluster)
    }

    /// The byte of the file at which one of them begins that is used, given out, or next.
    fn offset(self, number: u64) -> u64 {
        self.origin.saturating_add(number.saturating_mul(self.cluster))
    }
}

/// Which of these places are free.
#[derive(Debug)]
pub struct Slots {
    places: Places,
    slots: table::Slots,
}

impl Slots {
    /// Those that the BAT leaves.
    pub fn new(header: &Header, survey: &Survey) -> Self {
        let (origin, cluster) = (header.data_start(), header.cluster_bytes());
        let top = survey.end.saturating_sub(origin) / cluster;
        Self { places: Places { origin, cluster }, slots: table::Slots::new(top, survey.held + survey.beyond) }
    }

    /// Where the file ends after `more` slots were given out, if there are none in front of byte `start`, where `start`
    /// is not 0. `None` behind the end of every file.
    pub fn end_after(&self, more: u64, start: u64) -> Option<u64> {
        let slots = &self.slots;
        let top = if start > 0 { slots.top_from(self.places.number(start), more) } else { slots.top_after(more) };
        top.checked_mul(self.places.cluster)?.checked_add(self.places.origin).filter(|&end| end <= i64::MAX as u64)
    }

    /// Where the highest one that is used or was given out ends in the file.
    pub fn end(&self) -> u64 {
        self.places.offset(self.slots.top())
    }

    /// Give out none in front of byte `start` of the file any more, and fill no gaps.
    pub fn skip_to(&mut self, start: u64) {
        self.slots.skip_to(self.places.number(start));
    }

    /// Give out the lowest one that nothing uses: the byte of the file at which it begins.
    ///
    /// # Errors
    /// [`ErrorCode::NoSpace`] where no entry or file reaches; I/O errors.
    pub fn take(&mut self, io: &mut dyn BlockIo, image: &Image) -> DriverResult<u64> {
        let places = self.places;
        let gap = self.slots.take_gap(&mut |used| {
            each_entry(io, image, &mut |_, entry| {
                used.add(places.number(image.header.offset(entry)));
                Ok(())
            })
        })?;
        if let Some(gap) = gap {
            return Ok(self.places.offset(gap));
        }
        let offset = self.end();
        if self.end_after(1, 0).is_none() || image.header.entry(offset).is_none() {
            let text = "the next cluster would lie further in the file than an entry of the BAT can say";
            return Err(DriverError::new(ErrorCode::NoSpace, text).at(image.device, offset));
        }
        self.slots.append()?;
        Ok(offset)
    }
}
