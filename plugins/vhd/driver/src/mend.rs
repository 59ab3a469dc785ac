//! Mending an image with blocks because somebody asked for it: structures that exist twice, of which one copy counts.
//!
//! The footer in front and the one at the end say the same; the batmap repeats what the bitmaps of the blocks say. Everything
//! else is there once: of two things that contradict each other, nobody knows which is right, and nothing of it is changed.
//! Where the copy that counts is whole, the other one is no damage, but what a crash of a commit leaves: it goes with the leaks.
//! The order, and the crash that each step survives:
//!
//! 1. The footer in front, one sector, *then a flush*. The one at the end is whole: it counts until then.
//! 2. The footer at the end, where no block is, *then a flush*. The one in front is whole, and counts.
//! 3. The batmap says nothing of any block any more, so that their bitmaps are read, as they are where its checksum is wrong.
//!    Half of it leaves the checksum wrong. *Then a flush.*

use crate::image::Image;
use alloc::format;
use alloc::string::String;
use instar_guest_sdk::abi::{FindingKind, Repair, RepairSummary};
use instar_guest_sdk::{BlockIo, DriverResult, OrderedWriter};
use instar_vhd_format::{FOOTER_BYTES, SECTOR};

/// Contradictions that are told, at most.
const MOST: u64 = 1_000;

/// What is to be mended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mend {
    /// The footer in front is written.
    head: bool,
    /// Byte offset of the footer at the end, if that is written.
    tail: Option<u64>,
    /// The batmap is made to say nothing.
    batmap: bool,
}

impl Image {
    /// See [`Source::plan_repair`](instar_guest_sdk::Source::plan_repair).
    pub fn plan_repair(
        &self,
        io: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<(Mend, RepairSummary)> {
        let all = repair == Repair::All;
        let mut told = 0;
        let mut tell = |text: String| {
            told += 1;
            if all && told <= MOST {
                finding(FindingKind::Corruption, &text);
            }
        };
        let survey = self.survey(io, &mut |_, text| {
            tell(format!("{text}: every repair of that would give up data"));
            Ok(())
        })?;
        self.compare_batmap(io, &mut |_, text| {
            tell(format!("{text}: every repair of that would give up the sectors that differ"));
            Ok(())
        })?;
        if self.unused(&survey) > 0 {
            finding(FindingKind::Leak, "room that no block uses goes when the image is copied, with `instar convert`");
        }
        let mut mend = Mend { head: all && !self.footers.head, ..Mend::default() };
        mend.batmap = self.batmap.as_ref().is_some_and(|batmap| !batmap.valid);
        if self.footers.tail.is_none_or(|(_, same)| !same) {
            mend.tail = self.place_for_tail(survey.end).filter(|_| told == 0);
            if mend.tail.is_none() {
                finding(
                    FindingKind::Leak,
                    "the footer at the end stays as it is: it would go over a block, or hide that the file is cut off",
                );
            }
        }
        let leaks = u64::from(mend.tail.is_some()) + u64::from(mend.batmap);
        let end = mend.tail.map_or(0, |tail| tail.saturating_add(FOOTER_BYTES as u64));
        let final_length = if end > self.file_length { end } else { 0 };
        Ok((mend, RepairSummary { corruptions: mend.head.into(), leaks, final_length }))
    }

    /// Where the footer at the end goes: where it is, else in the file's last sector if no block reaches so far, else behind
    /// the file. `used` is the end of the last block.
    fn place_for_tail(&self, used: u64) -> Option<u64> {
        if let Some((place, _)) = self.footers.tail {
            return Some(place);
        }
        let last = (self.file_length / SECTOR * SECTOR).checked_sub(FOOTER_BYTES as u64)?;
        let is_free = last >= used && (self.fixed_length || self.file_length.is_multiple_of(SECTOR));
        if is_free {
            return Some(last);
        }
        self.file_length.max(used).checked_next_multiple_of(SECTOR).filter(|_| !self.fixed_length)
    }

    /// See [`Source::repair`](instar_guest_sdk::Source::repair).
    pub fn repair(&mut self, io: &mut dyn BlockIo, mend: Mend) -> DriverResult<()> {
        let mut out = OrderedWriter::new(self.device);
        let footer = self.footers.footer.encode();
        if mend.head {
            out.write(io, 0, &footer)?;
            out.barrier(io)?;
        }
        if let Some(place) = mend.tail {
            out.write(io, place, &footer)?;
            out.barrier(io)?;
        }
        if let Some(batmap) = self.batmap.as_mut().filter(|_| mend.batmap) {
            batmap.clear();
            batmap.write(io, &mut out)?;
        }
        out.barrier(io)
    }
}
