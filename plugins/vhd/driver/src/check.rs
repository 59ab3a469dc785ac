//! What `check` tells of an image with blocks.

use crate::image::Image;
use crate::table::Table;
use crate::verify::{Complain, Survey};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{CheckSummary, FindingKind, Request};
use instar_guest_sdk::{overflow, BlockIo, DriverResult};
use instar_vhd_format::{Bitmap, SECTOR};

/// Entries of the table that are gone through at once for the batmap.
const ENTRIES: u64 = 1 << 12;
/// Contradictions that are told, at most.
const MOST: u64 = 10_000;
/// Sectors of bitmap that are read at once.
const BITMAPS: usize = 256;

impl Image {
    /// See [`Source::check`](instar_guest_sdk::Source::check).
    pub fn check(
        &self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        let mut found = CheckSummary::default();
        let mut tell = |kind, text: &str| {
            match kind {
                FindingKind::Corruption => found.corruptions += 1,
                FindingKind::Leak => found.leaks += 1,
            }
            finding(kind, text);
        };
        if !self.footers.head {
            let text = "the copy of the footer in front of the file is damaged: only the one at the end is left";
            tell(FindingKind::Corruption, text);
        }
        // What a crash leaves of the copies that do not count: a new block, or a new size, comes before the footer behind it,
        // and the batmap before its checksum.
        match self.footers.tail {
            Some((_, true)) => {}
            Some((_, false)) => tell(
                FindingKind::Leak,
                "redundancy: the footer at the end is out of date, and its copy in front counts",
            ),
            None => {
                tell(FindingKind::Leak, "redundancy: the footer at the end is missing, and its copy in front counts")
            }
        }
        let mut told = 0;
        let surveyed = self.survey(io, &mut |offset, text| {
            tell(FindingKind::Corruption, &text);
            told += 1;
            // A table in a hole says nonsense of every block.
            if told < MOST {
                Ok(())
            } else {
                Err(self.corrupt(offset, "too much"))
            }
        });
        if told == MOST {
            let text = "there is more that is wrong with the block allocation table: the rest of it is not looked at";
            tell(FindingKind::Corruption, text);
            return Ok(found);
        }
        let survey = surveyed?;
        if let Some(batmap) = &self.batmap {
            if !batmap.valid {
                tell(
                    FindingKind::Leak,
                    "redundancy: the checksum of the batmap is wrong, and the bitmaps of the blocks count",
                );
            }
            self.compare_batmap(io, &mut |_, text| {
                tell(FindingKind::Corruption, &text);
                Ok(())
            })?;
        }
        let unused = self.unused(&survey);
        if unused > 0 {
            finding(FindingKind::Leak, &format!("room for {unused} blocks is used by none"));
        }
        found.leaks = found.leaks.saturating_add(unused);
        found.image_end_offset = survey.end.min(self.file_length);
        found.total_clusters = self.blocks();
        found.allocated_clusters = survey.held;
        found.fragmented_clusters = survey.fragmented;
        let block = self.header.block_size();
        found.unused_tail = self.data_end().saturating_sub(survey.end) / block * block;
        Ok(found)
    }

    /// Whole blocks' worth of the file between metadata and the last block that no entry names.
    pub fn unused(&self, survey: &Survey) -> u64 {
        // Blocks that are aligned have a gap before them.
        let stride = self.header.stride();
        let each =
            self.place_behind(stride).unwrap_or(stride).max(stride).saturating_add(instar_vhd_format::DATA_ALIGNMENT);
        let metadata: u64 = self.metadata().iter().map(|(range, _)| range.end - range.start).sum();
        let used = survey.held.saturating_mul(each).saturating_add(metadata);
        survey.end.saturating_sub(used) / stride
    }

    /// Compare what the batmap says with the bitmaps of its blocks.
    ///
    /// # Errors
    /// Those of `complain`; I/O errors.
    pub fn compare_batmap(&self, io: &mut dyn BlockIo, complain: Complain<'_>) -> DriverResult<()> {
        let Some(batmap) = &self.batmap else { return Ok(()) };
        Table::each(io, self, ENTRIES, &mut |io, table| {
            let mut wanted = Vec::new();
            for (block, entry) in table.iter().filter(|(block, _)| batmap.is_full(*block)) {
                // One that is not in the file was told of already.
                let Ok(Some(place)) = self.block_place(block, entry) else { continue };
                let visible = self.size.saturating_sub(block.saturating_mul(self.header.block_size()));
                let sectors = visible.min(self.header.block_size()) / SECTOR;
                wanted.extend((0..sectors.div_ceil(4096)).map(|at| (block, place + at * SECTOR, sectors - at * 4096)));
            }
            for some in wanted.chunks(BITMAPS) {
                let mut bitmaps = vec![Bitmap::EMPTY; some.len()];
                let request = |(bitmap, (_, place, _)): (&mut Bitmap, &(u64, u64, u64))| {
                    Request::read(self.device, *place, bitmap.0.as_mut_ptr() as u64, SECTOR)
                };
                let mut requests: Vec<Request> = bitmaps.iter_mut().zip(some).map(request).collect();
                io.run(&mut requests)?;
                for (bitmap, (block, place, sectors)) in bitmaps.iter().zip(some) {
                    let sectors = usize::try_from((*sectors).min(4096)).map_err(|_| overflow("a bitmap"))?;
                    if bitmap.next_run(0, sectors) != Some(0..sectors) {
                        complain(
                            *place,
                            format!("the batmap says that block {block} is full, and its bitmap does not"),
                        )?;
                    }
                }
            }
            Ok(())
        })
    }
}
