//! Mending an image because somebody asked for it: structures that exist twice, of which one copy counts, and a log to
//! replay.
//!
//! Blocks are named once: of two things that contradict each other, nobody knows which is right, and nothing of it is changed.
//! The order, and the crash that each step survives:
//!
//! 1. The [session begins](Image::begin): a header goes over the one that does not count or is damaged, *then a flush*, then
//!    over the other one, *then a flush*. One of them is whole at each instant. What the log has to do is done, *then a flush*,
//!    and with that durable the headers say that the log is empty. A crash within leaves the log, which is replayed again.
//! 2. The region table goes over its damaged copy, *then a flush*. The other one is whole, and counts.

use crate::image::Image;
use alloc::format;
use alloc::vec;
use instar_guest_sdk::abi::{FindingKind, Repair, RepairSummary};
use instar_guest_sdk::{BlockIo, DriverResult, OrderedWriter};
use instar_vhdx_format::{RegionTable, REGION_TABLE_BYTES, REGION_TABLE_OFFSETS};

/// Contradictions that are told, at most.
const MOST: u64 = 1_000;

impl Image {
    /// See [`Source::plan_repair`](instar_guest_sdk::Source::plan_repair). The file may become `max_length` bytes long.
    pub fn plan_repair(
        &self,
        io: &mut dyn BlockIo,
        repair: Repair,
        max_length: u64,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<RepairSummary> {
        let all = repair == Repair::All;
        let mut told = 0;
        let survey = self.survey(io, &mut |_, text| {
            told += 1;
            if all && told <= MOST {
                let text = format!("{text}: every repair of that would give up data");
                finding(FindingKind::Corruption, &text);
            }
            Ok(())
        })?;
        if survey.unused >= self.layout.block_size {
            finding(FindingKind::Leak, "room that no block uses goes when the image is copied, with `instar convert`");
        }
        if !all {
            return Ok(RepairSummary::default());
        }
        let replays = self.opened.headers.current.is_dirty();
        let length = self.opened.file_length.max(self.real_length);
        let why = match replays {
            true if told != 0 => "what is wrong shows in it",
            true if length > self.real_length && self.fixed_length => "a block device cannot become as long as it says",
            true if length > max_length => "the file may not become as long as the log says",
            _ => "",
        };
        if !why.is_empty() {
            let text = format!("the log stays as it is, and so does everything else: {why}");
            finding(FindingKind::Corruption, &text);
            return Ok(RepairSummary::default());
        }
        let copies = [!self.opened.headers.both, !self.opened.regions.both, replays];
        let final_length = if length > self.real_length { length } else { 0 };
        Ok(RepairSummary { corruptions: copies.into_iter().map(u64::from).sum(), leaks: 0, final_length })
    }

    /// See [`Source::repair`](instar_guest_sdk::Source::repair).
    pub fn repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let mut out = OrderedWriter::new(self.device);
        let header = self.opened.headers.current;
        // A FileWriteGuid that announces the parent's identity stays.
        let announces = self.opened.lineage().is_some_and(|lineage| lineage.parent() == header.file_write);
        let file_write = if announces { header.file_write } else { header.file_write.next_file_write() };
        self.begin(io, &mut out, file_write, header.data_write)?;
        if !self.opened.regions.both {
            let [mut first, mut second] = [(); 2].map(|()| vec![0; REGION_TABLE_BYTES]);
            io.read(self.device, REGION_TABLE_OFFSETS[0], &mut first)?;
            io.read(self.device, REGION_TABLE_OFFSETS[1], &mut second)?;
            // Alone, the one that is whole makes sense.
            let log = header.log();
            let alone = RegionTable::choose(&first, &[], &log, self.opened.file_length);
            let (damaged, whole) = if alone.is_ok() { (1, &first) } else { (0, &second) };
            out.write(io, REGION_TABLE_OFFSETS[damaged], whole)?;
            self.opened.regions.both = true;
        }
        out.barrier(io)
    }
}
