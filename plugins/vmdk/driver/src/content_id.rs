//! The descriptor, and writing content IDs into it, each with one write of a few bytes within one sector.

use crate::failures::at;
use alloc::string::String;
use alloc::vec;
use instar_guest_sdk::abi::{ErrorCode, FileDevice};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, OrderedWriter};
use instar_vmdk_format::{ContentId, Descriptor, Step};

/// A descriptor, and where it stands.
#[derive(Debug)]
pub struct DescriptorPlace {
    pub device: u32,
    /// Its first byte.
    pub offset: u64,
    /// Bytes of its place.
    pub length: u64,
    /// How long its file may become, in bytes.
    pub longest: u64,
    pub text: Descriptor,
}

impl DescriptorPlace {
    /// Read a descriptor of `length` bytes, which the caller has bounded.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn read(
        io: &mut dyn BlockIo,
        file: &FileDevice,
        (offset, length): (u64, u64),
        corrupt: ErrorCode,
    ) -> DriverResult<Self> {
        let FileDevice { device, max_length: longest, .. } = *file;
        let mut text = vec![0; usize::try_from(length).map_err(|_| overflow("the descriptor"))?];
        io.read(device, offset, &mut text)?;
        let text = Descriptor::parse(&text).map_err(at(corrupt, device, offset))?;
        Ok(Self { device, offset, length, longest, text })
    }

    fn replacement(&self, id: &ContentId, value: u32, marked: bool) -> DriverResult<String> {
        id.replacement(value, marked, self.offset)
            .map_err(|error| DriverError::new(ErrorCode::UnsupportedFormat, error.text).at(self.device, self.offset))
    }

    /// Whether an ID can be replaced by `value`.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if not.
    pub fn can_replace(&self, id: &ContentId, value: u32) -> DriverResult<()> {
        self.replacement(id, value, false).map(|_| ())
    }

    /// Replace an ID, [marked](ContentId::marked) or not, durably. Returns it as it stands there now.
    ///
    /// # Errors
    /// As [`DescriptorPlace::can_replace`]; I/O errors.
    pub fn replace(&self, io: &mut dyn BlockIo, id: &ContentId, value: u32, marked: bool) -> DriverResult<ContentId> {
        if (id.value, id.marked) != (value, marked) {
            let digits = self.replacement(id, value, marked)?;
            io.write(self.device, self.offset.saturating_add(id.digits.start as u64), digits.as_bytes())?;
            io.flush(self.device)?;
        }
        Ok(ContentId { value, digits: id.digits.clone(), marked })
    }

    /// Do these steps on the descriptor's device, each durably before the next one.
    ///
    /// # Errors
    /// I/O errors.
    pub fn take(&self, io: &mut dyn BlockIo, steps: &[Step]) -> DriverResult<()> {
        let mut out = OrderedWriter::new(self.device);
        for step in steps {
            if let Some(length) = step.length {
                out.set_length(io, length)?;
            }
            step.writes.iter().try_for_each(|(offset, bytes)| out.write(io, *offset, bytes))?;
            out.barrier(io)?;
        }
        Ok(())
    }
}
