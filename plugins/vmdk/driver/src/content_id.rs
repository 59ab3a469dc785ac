//! Writing content IDs into the descriptor, each with one write of a few bytes within one sector.

use crate::image::Image;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_vmdk_format::{ContentId, SECTOR};

impl Image {
    fn replacement(&self, id: &ContentId, value: u32) -> DriverResult<alloc::string::String> {
        let offset = self.header.descriptor_offset * SECTOR;
        id.replacement(value, offset)
            .map_err(|error| DriverError::new(ErrorCode::UnsupportedFormat, error.text).at(self.device, offset))
    }

    /// Whether an ID can be replaced by `value`.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if not.
    pub fn can_replace(&self, id: &ContentId, value: u32) -> DriverResult<()> {
        self.replacement(id, value).map(|_| ())
    }

    /// Replace an ID, durably.
    ///
    /// # Errors
    /// As [`Image::can_replace`]; I/O errors.
    pub fn replace(&self, io: &mut dyn BlockIo, id: &mut ContentId, value: u32) -> DriverResult<()> {
        if id.value == value {
            return Ok(());
        }
        let digits = self.replacement(id, value)?;
        let offset = self.header.descriptor_offset * SECTOR + id.digits.start as u64;
        io.write(self.device, offset, digits.as_bytes())?;
        io.flush(self.device)?;
        id.value = value;
        Ok(())
    }
}
