//! What a session of changes does to the headers (2.2.2.1), and the replay that comes before any other change.
//!
//! A header is written over the one that does not count, so that a crash leaves the other one, and made durable; then the same
//! again over the other, so that either may be lost.

use crate::image::Image;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::{Batch, BlockIo, DriverResult, OrderedWriter};
use instar_vhdx_format::{Guid, Header, HEADER_OFFSETS};

impl Image {
    /// Change what the header says, durably.
    ///
    /// # Errors
    /// I/O errors.
    pub fn update_header(
        &mut self,
        io: &mut dyn BlockIo,
        out: &mut OrderedWriter,
        change: impl FnOnce(&mut Header),
    ) -> DriverResult<()> {
        self.update_one_header(io, out, change)?;
        self.update_one_header(io, out, |_| ())?;
        self.opened.headers.both = true;
        Ok(())
    }

    /// The same with one header only, which is all that may be changed of an image before its parent is.
    ///
    /// # Errors
    /// I/O errors.
    pub fn update_one_header(
        &mut self,
        io: &mut dyn BlockIo,
        out: &mut OrderedWriter,
        change: impl FnOnce(&mut Header),
    ) -> DriverResult<()> {
        let headers = &mut self.opened.headers;
        change(&mut headers.current);
        // Numbers are bounded when an image is opened.
        headers.current.sequence += 1;
        headers.slot ^= 1;
        out.write(io, HEADER_OFFSETS[headers.slot], &headers.current.encode())?;
        out.barrier(io)
    }

    /// Begin to change the image: a FileWriteGuid of its own, unless `file_write` is already one, then what the log has to do;
    /// with an empty log, or with the header that says so, `data_write` becomes the DataWriteGuid.
    ///
    /// # Errors
    /// I/O errors.
    pub fn begin(
        &mut self,
        io: &mut dyn BlockIo,
        out: &mut OrderedWriter,
        file_write: Guid,
        data_write: Guid,
    ) -> DriverResult<()> {
        let dirty = self.opened.headers.current.is_dirty();
        self.update_header(io, out, |header| {
            header.file_write = file_write;
            if !dirty {
                header.data_write = data_write;
            }
        })?;
        if dirty {
            self.replay(io, out)?;
            self.update_header(io, out, |header| (header.log_guid, header.data_write) = (Guid::NULL, data_write))?;
        }
        Ok(())
    }

    /// Do what the log has to do, durably. A crash within leaves the log as it is, and the same is done again.
    fn replay(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        let Some(replay) = self.opened.replay.take() else { return Ok(()) };
        if replay.file_length() > self.real_length {
            out.set_length(io, replay.file_length())?;
            self.real_length = replay.file_length();
        }
        let mut batch = Batch::new();
        for range in replay.zeroes() {
            batch.push(Request::zero(self.device, range.start, range.end - range.start));
        }
        for (offset, bytes) in replay.pages() {
            batch.push(Request::write(self.device, offset, bytes.as_ptr() as u64, bytes.len() as u64));
        }
        batch.submit_to(io, out)?;
        out.barrier(io)
    }
}
