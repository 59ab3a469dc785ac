//! Mending a hosted extent because somebody asked for it: what it says twice, and the mark of one that was not closed.
//!
//! A grain that lies past the end of the file, and has no other copy, is lost: nothing says where its data is, and nothing is
//! written into such an extent. The order, and the crash that each step survives:
//!
//! 1. Entries of the first tables that name places past the end of the file get what the second tables say, *then a flush*.
//!    Each entry is the old or the new one; the second tables are as they were.
//! 2. The second tables get what the first ones say, *then a flush*. The first ones count.
//! 3. `uncleanShutdown`, within one sector, *then a flush*: until then the extent says that it was not closed.

use crate::image::Image;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{FindingKind, Repair, RepairSummary};
use instar_guest_sdk::table::tell_findings;
use instar_guest_sdk::{BlockIo, DriverResult, OrderedWriter};
use instar_vmdk_format::{HEADER_BYTES, UNCLEAN_SHUTDOWN};

/// What the check says of an extent that is damaged throughout.
pub const REST: &str = "the grain tables are damaged throughout: the rest of them is not looked at";

/// What is to be mended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mend {
    /// Tables: those of which the second copy is out of date, or all.
    tables: Option<Repair>,
    /// `uncleanShutdown` becomes 0.
    mark: bool,
}

impl Image {
    /// Tell where the two copies differ, and of an extent that was not closed. Returns the numbers of corruptions and leaks.
    ///
    /// # Errors
    /// I/O errors.
    pub fn compare_copies(
        &self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<(u64, u64)> {
        let (mut corruptions, mut leaks) = (0, 0);
        self.each_pair(io, &mut |_, pair| {
            if self.merged(pair).keeps_first(pair) {
                leaks += 1;
                finding(FindingKind::Leak, &out_of_date(pair.index));
            } else {
                corruptions += 1;
                finding(FindingKind::Corruption, &differs(pair.index));
            }
            Ok(())
        })?;
        if self.unclean {
            corruptions += 1;
            finding(FindingKind::Corruption, "the extent was not closed (uncleanShutdown), or is open in VMware");
        }
        Ok((corruptions, leaks))
    }

    /// See [`Source::plan_repair`](instar_guest_sdk::Source::plan_repair).
    ///
    /// # Errors
    /// I/O errors.
    pub fn plan_repair(
        &mut self,
        io: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<(Mend, RepairSummary)> {
        let all = repair == Repair::All;
        let tell_lost = &mut |kind, text: &str| {
            if all {
                finding(kind, &format!("{text}: nothing says where its data is, and it would be lost"));
            }
        };
        self.merges = true;
        let surveyed = tell_findings(tell_lost, REST, |wrong| self.survey(io, wrong));
        self.merges = false;
        let (_, lost) = surveyed?;
        let (mut tables, mut stale, mut unclear) = (0, 0, 0);
        self.each_pair(io, &mut |_, pair| {
            let merged = self.merged(pair);
            if merged.keeps_first(pair) {
                stale += 1;
                return Ok(());
            }
            tables += u64::from(all && merged.changes(pair));
            if merged.unclear > 0 {
                unclear += 1;
                if all && unclear <= MOST {
                    finding(FindingKind::Corruption, &no_answer(pair.index, merged.unclear));
                }
            }
            Ok(())
        })?;
        let unclean = all && self.unclean;
        if lost > 0 {
            // Whatever one of the tables is mistaken for may be the data of another one.
            if unclean || tables > 0 || stale > 0 {
                let kind = if all { FindingKind::Corruption } else { FindingKind::Leak };
                finding(kind, "the extent stays as it is: what is wrong with it may be more than that");
            }
            return Ok(Default::default());
        }
        let mend = Mend { tables: (tables + stale > 0).then_some(repair), mark: unclean && unclear == 0 };
        if unclean && !mend.mark {
            finding(FindingKind::Corruption, "the extent stays marked as one that was not closed");
        }
        let corruptions = tables + u64::from(mend.mark);
        Ok((mend, RepairSummary { corruptions, leaks: stale, final_length: 0 }))
    }

    /// See [`Source::repair`](instar_guest_sdk::Source::repair).
    ///
    /// # Errors
    /// I/O errors.
    pub fn repair(&self, io: &mut dyn BlockIo, mend: Mend) -> DriverResult<()> {
        let mut out = OrderedWriter::new(self.device);
        if let Some(what) = mend.tables {
            // Of leaks, the first copies are as they are to be.
            self.each_pair(io, &mut |io, pair| {
                let merged = self.merged(pair);
                match self.table_offset(&self.directory, pair.index)? {
                    Some(offset) if what == Repair::All && merged.first != pair.first => {
                        out.write(io, offset, &bytes(&merged.first))
                    }
                    _ => Ok(()),
                }
            })?;
            out.barrier(io)?;
            self.each_pair(io, &mut |io, pair| {
                let merged = self.merged(pair);
                if what == Repair::Leaks && !merged.keeps_first(pair) {
                    return Ok(());
                }
                let offset = self.redundant.as_ref().map(|second| self.table_offset(second, pair.index)).transpose()?;
                match offset.flatten() {
                    Some(offset) if merged.second != pair.second => out.write(io, offset, &bytes(&merged.second)),
                    _ => Ok(()),
                }
            })?;
            out.barrier(io)?;
        }
        if mend.mark {
            let mut header = [0; HEADER_BYTES];
            io.read(self.device, 0, &mut header)?;
            if let Some(mark) = header.get_mut(UNCLEAN_SHUTDOWN) {
                *mark = 0;
            }
            out.write(io, 0, &header)?;
            out.barrier(io)?;
        }
        Ok(())
    }
}

/// Tables without a right answer that are told, at most.
const MOST: u64 = 1_000;

fn out_of_date(table: usize) -> String {
    format!("redundancy: the second copy of grain table {table} is out of date, and the first one counts")
}

fn differs(table: usize) -> String {
    format!("the second copy of grain table {table} differs from the first one")
}

fn no_answer(table: usize, entries: usize) -> String {
    let grains = if entries == 1 { "1 grain".into() } else { format!("{entries} grains") };
    format!("{}, on {grains}: nothing says which is right, and the data of one would be lost", differs(table))
}

fn bytes(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}
