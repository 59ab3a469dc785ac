//! Another parent for a differencing disk: identity and names stand in the parent locator, which the log changes as a whole.
//!
//! 1. the header gets a new FileWriteGuid, and what the log has to do is done, as [before emptying](crate::empty);
//! 2. one entry of the log makes the locator another one, and has the metadata table say where it stands and how long it is. A
//!    crash leaves the old locator or the new one;
//! 3. the log is empty again, with a FileWriteGuid that announces nothing.
//!
//! The DataWriteGuid stays: what a guest reads is the same.

use crate::image::Image;
use crate::journal::{updates, Journal};
use crate::pages::Pages;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, PARENT_ROOM};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, OrderedWriter, Parent};
use instar_vhdx_format::{Guid, Item, Locator, Metadata, ALIGNMENT, TABLE_BYTES};

/// A parent that the image can record.
#[derive(Debug)]
pub struct NewParent {
    /// The locator that names it.
    locator: Vec<u8>,
    /// Where that goes.
    item: Item,
    /// The byte of the metadata region at which the table says so.
    entry: u32,
}

impl Image {
    /// See [`Source::plan_parent`](instar_guest_sdk::Source::plan_parent).
    pub fn plan_parent(&self, io: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<NewParent> {
        let region = &self.opened.metadata_region;
        let refused =
            |text: String| DriverError::new(ErrorCode::UnsupportedFormat, text).at(self.device, region.offset);
        if !self.layout.has_parent {
            return Err(refused("it has no parent that could be another one".into()));
        }
        let Some(parent) = parent else {
            let text = "a differencing VHDX cannot be without a parent: commit it into its present one";
            return Err(refused(text.into()));
        };
        let (path, id) = parent.of_format("vhdx", self.layout.size).map_err(|error| refused(error.text))?;
        let new = instar_vhdx_format::Parent { data_write: Guid(id), path: path.into() };
        let locator = Locator::of_parent(&new).map_err(|error| refused(error.text))?;
        self.verify(io)?;
        let mut table = vec![0; TABLE_BYTES];
        self.read(io, region.offset, &mut table)?;
        let length = u32::try_from(locator.len()).map_err(|_| overflow("the parent locator"))?;
        let place =
            Metadata::place_locator(&table, region, length).map_err(|error| self.corrupt(error.offset, error.text))?;
        let Some((item, entry)) = place else {
            let text = "the metadata region has no room for the name of the parent: give the parent a shorter name";
            return Err(refused(text.into()));
        };
        // Replay and log have the file be whole MiB.
        let longest = self.real_length.max(self.opened.file_length).next_multiple_of(ALIGNMENT);
        if longest - self.real_length > PARENT_ROOM && !self.fixed_length {
            let text =
                format!("the file has to be {longest} bytes long for its log: extend it with `truncate -s {longest}`");
            return Err(refused(text));
        }
        Ok(NewParent { locator, item, entry })
    }

    /// See [`Source::set_parent`](instar_guest_sdk::Source::set_parent).
    pub fn set_parent(&mut self, io: &mut dyn BlockIo, new: &NewParent) -> DriverResult<()> {
        let mut out = OrderedWriter::new(self.device);
        let header = self.opened.headers.current;
        let is_mark = self.opened.lineage().is_some_and(|lineage| lineage.parent() == header.file_write);
        let file_write = if is_mark { header.file_write } else { header.file_write.next_file_write() };
        self.begin(io, &mut out, file_write, header.data_write)?;
        let region = self.opened.metadata_region.offset;
        let place = region.saturating_add(new.item.offset.into());
        let (mut pages, mut journal) = (Pages::default(), Journal::default());
        pages.put(io, self, place, &new.locator)?;
        pages.put(io, self, region.saturating_add(new.entry.into()), &new.item.encode())?;
        journal.commit(io, self, &mut out, &updates([], pages.into_vec()))?;
        journal.close(io, self, &mut out, file_write.next_file_write())?;
        self.opened.metadata.locator = Some(new.item);
        let locator = Locator::parse(&new.locator, place).map_err(|error| self.corrupt(error.offset, error.text))?;
        self.opened.locator = Some(locator);
        Ok(())
    }
}
