//! What `check` tells of an image.

use crate::image::Image;
use alloc::format;
use instar_guest_sdk::abi::{CheckSummary, FindingKind};
use instar_guest_sdk::{BlockIo, DriverResult};

/// Contradictions that are told, at most.
const MOST: u64 = 10_000;

impl Image {
    /// See [`Source::check`](instar_guest_sdk::Source::check). A log that is to be replayed is nothing wrong: everything is
    /// seen through it.
    pub fn check(
        &self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        let mut found = CheckSummary::default();
        let mut corrupt = |text: &str| {
            found.corruptions += 1;
            finding(FindingKind::Corruption, text);
        };
        if !self.opened.headers.both {
            corrupt("one of the two headers is damaged: the other one is used");
        }
        if !self.opened.regions.both {
            corrupt("one of the two region tables is damaged: the other one is used");
        }
        let mut told = 0;
        let surveyed = self.survey(io, &mut |offset, text| {
            corrupt(&text);
            told += 1;
            if told < MOST {
                Ok(())
            } else {
                Err(self.corrupt(offset, "too much"))
            }
        });
        if told == MOST {
            corrupt("there is more that is wrong with the block allocation table: the rest of it is not looked at");
            return Ok(found);
        }
        let survey = surveyed?;
        let block = self.layout.block_size;
        let leaks = survey.unused / block;
        if leaks > 0 {
            finding(FindingKind::Leak, &format!("room for {leaks} blocks is used by none"));
        }
        found.leaks = leaks;
        found.image_end_offset = survey.end.min(self.opened.file_length);
        found.total_clusters = self.layout.blocks();
        found.allocated_clusters = survey.held;
        found.fragmented_clusters = survey.fragmented;
        found.unused_tail = self.opened.file_length.saturating_sub(survey.end) / block * block;
        Ok(found)
    }
}
