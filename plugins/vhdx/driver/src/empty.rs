//! Emptying a differencing disk, in an order that every crash survives:
//!
//! 1. the header gets a new FileWriteGuid, and what the log has to do is done. The FileWriteGuid stays if it is what announces
//!    the parent's identity;
//! 2. one entry of the log makes all entries of the block allocation table 0, those of sector bitmaps included, and brings the
//!    parent locator up to date. A crash leaves either everything as it was or an empty image that goes with its parent;
//! 3. the log is empty again, with a FileWriteGuid that announces nothing;
//! 4. only then is the file cut behind its last region, and space between regions given back: the log has recorded the longer
//!    file, and a file that is shorter than its log says is corrupt.

use crate::image::Image;
use crate::journal::{updates, Journal};
use crate::pages::{Pages, PAGE};
use crate::table::Table;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{Batch, BlockIo, DriverResult, OrderedWriter};
use instar_vhdx_format::{keys, Entry, Guid, State, GUID_TEXT_BYTES};

/// Entries of the table that are gone through at once.
const ENTRIES: u64 = 1 << 14;

impl Image {
    /// See [`Source::empty`](instar_guest_sdk::Source::empty).
    pub fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        let mut out = OrderedWriter::new(self.device);
        let (mut dropped, mut named) = (0, false);
        Table::each(io, self, ENTRIES, &mut |table| {
            for (number, entry) in table.iter() {
                named |= entry != Entry::NONE;
                let is_payload = self.layout.entry_of(number).is_ok_and(|block| block < self.layout.blocks());
                dropped += u64::from(is_payload && entry.state() != Some(State::NotPresent));
            }
            Ok(())
        })?;
        let lineage = self.opened.lineage();
        let stale = lineage.filter(|lineage| lineage.parent() != lineage.linkage);
        let end = self.metadata_end();
        if !named && stale.is_none() && !self.opened.headers.current.is_dirty() && self.real_length <= end {
            return Ok(dropped);
        }
        let header = self.opened.headers.current;
        let is_mark = stale.is_some_and(|lineage| lineage.parent() == header.file_write);
        let file_write = if is_mark { header.file_write } else { header.file_write.next_file_write() };
        self.begin(io, &mut out, file_write, header.data_write)?;
        let mut journal = Journal::default();
        let mut pages = Pages::default();
        if let Some(lineage) = stale {
            self.put_linkage(io, &mut pages, keys::LINKAGE, lineage.parent())?;
            self.put_linkage(io, &mut pages, keys::LINKAGE2, Guid::NULL)?;
        }
        let table = self.entry_place(0)..self.entry_place(self.layout.entries()).next_multiple_of(PAGE);
        journal.commit(io, self, &mut out, &updates(Some(table).filter(|_| named), pages.into_vec()))?;
        journal.close(io, self, &mut out, file_write.next_file_write())?;
        self.give_back(io, &mut out, end)?;
        Ok(dropped)
    }

    /// Replace a linkage in the locator, if it has the key.
    fn put_linkage(&self, io: &mut dyn BlockIo, pages: &mut Pages, key: &str, guid: Guid) -> DriverResult<()> {
        let value = self.opened.locator.as_ref().and_then(|locator| locator.value(key));
        let (Some(value), Some(item)) = (value, self.opened.metadata.locator) else { return Ok(()) };
        if usize::from(value.length) != GUID_TEXT_BYTES {
            return Ok(());
        }
        let place = self.opened.metadata_region.offset.saturating_add(item.offset.into());
        pages.put(io, self, place.saturating_add(value.offset.into()), &guid.encode())
    }

    /// Step 4: `end` is the end of the last region.
    fn give_back(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter, end: u64) -> DriverResult<()> {
        if self.real_length > end && !self.fixed_length {
            out.set_length(io, end)?;
            self.real_length = end;
        }
        let mut batch = Batch::new();
        let mut at = 0;
        for (range, _) in self.taken() {
            if range.start > at {
                batch.push(Request::discard(self.device, at, range.start - at));
            }
            at = range.end.max(at);
        }
        batch.submit_to(io, out)?;
        out.barrier(io)
    }
}
