//! The log as it is written (2.3): each entry is one change of metadata, which happens wholly or not at all.
//!
//! 1. what the entry will refer to, and what the entry before it did, is durable;
//! 2. the entry is, and, with the first one, a header that has the log count. A crash before leaves a log that is empty, or whose
//!    newest entry is the one before, which does again what is done already;
//! 3. its updates go to their places. A crash from here on leaves the entry, which is replayed.
//!
//! So each entry is its own tail, and never overwrites the one before it. The header gets the new LogGuid after the first entry
//! and not before it, as QEMU has it: in between, the log would count and hold nothing, which every program must refuse.

use crate::image::Image;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{overflow, Batch, BlockIo, DriverResult, OrderedWriter};
use instar_vhdx_format::{Guid, NewEntry, Update, ALIGNMENT, PAGES_PER_ENTRY};

/// The log of a session.
#[derive(Debug, Default)]
pub struct Journal {
    /// Byte offset in the log at which the next entry goes, if it fits there.
    at: u32,
    /// Entries that were written.
    sequence: u64,
}

impl Journal {
    /// Whether anything was logged since the log was empty.
    pub const fn is_open(&self) -> bool {
        self.sequence > 0
    }

    /// Change metadata by these updates. Not in their places durably when it returns, but in the log.
    ///
    /// # Errors
    /// I/O errors.
    pub fn commit(
        &mut self,
        io: &mut dyn BlockIo,
        image: &mut Image,
        out: &mut OrderedWriter,
        updates: &[Update],
    ) -> DriverResult<()> {
        let pages = updates.iter().filter(|update| matches!(update, Update::Page { .. })).count();
        if pages > PAGES_PER_ENTRY || updates.len() > PAGES_PER_ENTRY + 8 {
            return Err(overflow("an entry of the log"));
        }
        if !image.real_length.is_multiple_of(ALIGNMENT) && !image.fixed_length {
            // The length that the entry records is whole MiB, and the file is not to be shorter.
            let length = image.real_length.checked_next_multiple_of(ALIGNMENT).ok_or_else(|| overflow("the file"))?;
            out.set_length(io, length)?;
            image.real_length = length;
        }
        out.barrier(io)?;
        let guid = image.opened.headers.current.file_write.log();
        let file_length = image.real_length / ALIGNMENT * ALIGNMENT;
        self.sequence += 1;
        let mut entry = NewEntry { at: self.at, sequence: self.sequence, guid, file_length, updates };
        let mut bytes = entry.encode();
        let length = u32::try_from(bytes.len()).map_err(|_| overflow("an entry of the log"))?;
        let header = &image.opened.headers.current;
        if self.at.checked_add(length).is_none_or(|end| end > header.log_length) {
            // In front of the one before: both are a third of the log at most.
            entry.at = 0;
            bytes = entry.encode();
        }
        self.at = entry.at + length;
        out.write(io, header.log_offset + u64::from(entry.at), &bytes)?;
        out.barrier(io)?;
        if self.sequence == 1 {
            image.update_header(io, out, |header| header.log_guid = guid)?;
        }
        let mut batch = Batch::new();
        for update in updates {
            batch.push(match update {
                Update::Zero(range) => Request::zero(image.device, range.start, range.end.saturating_sub(range.start)),
                Update::Page { offset, bytes } => {
                    Request::write(image.device, *offset, bytes.as_ptr() as u64, bytes.len() as u64)
                }
            });
        }
        batch.submit_to(io, out)
    }

    /// Empty the log: everything is in its place, durably. `file_write` becomes the FileWriteGuid.
    ///
    /// # Errors
    /// I/O errors.
    pub fn close(
        &mut self,
        io: &mut dyn BlockIo,
        image: &mut Image,
        out: &mut OrderedWriter,
        file_write: Guid,
    ) -> DriverResult<()> {
        out.barrier(io)?;
        image.update_header(io, out, |header| (header.log_guid, header.file_write) = (Guid::NULL, file_write))?;
        *self = Self::default();
        Ok(())
    }
}

/// The updates of the pages that are collected, and of ranges that become zero.
pub fn updates(zeroes: impl IntoIterator<Item = core::ops::Range<u64>>, pages: Vec<(u64, Vec<u8>)>) -> Vec<Update> {
    let pages = pages.into_iter().map(|(offset, bytes)| Update::Page { offset, bytes });
    zeroes.into_iter().filter(|range| !range.is_empty()).map(Update::Zero).chain(pages).collect()
}
