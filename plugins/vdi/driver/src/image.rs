//! An open image: its header, and where blocks lie in the file.

use alloc::format;
use alloc::string::String;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, ImageInfo};
use instar_guest_sdk::table::Disk;
use instar_guest_sdk::{checked_end, overflow, BlockIo, DriverError, DriverResult, OrderedWriter};
use instar_vdi_format::{Header, Trouble, HEADER_BYTES};

/// An open image.
#[derive(Debug)]
pub struct Image {
    pub device: u32,
    pub header: Header,
    /// Bytes of the file.
    pub file_length: u64,
    /// The code of what no image may say.
    corrupt: ErrorCode,
}

/// The number of a block, as the map counts them.
///
/// # Errors
/// An arithmetic guard.
pub fn block_number(cluster: u64) -> DriverResult<u32> {
    u32::try_from(cluster).map_err(|_| overflow("a block"))
}

impl Image {
    /// Read the header. `corrupt` is the code of what no image may say.
    ///
    /// # Errors
    /// [`ErrorCode::HeaderMismatch`] when the image is not what the host saw; corruption; I/O errors.
    pub fn open(io: &mut dyn BlockIo, device: &DeviceConfig, corrupt: ErrorCode) -> DriverResult<Self> {
        let (number, file_length) = (device.device, device.file_length);
        let mut bytes = [0; HEADER_BYTES];
        io.read(number, 0, &mut bytes)?;
        let header = Header::parse(&bytes).map_err(|error| {
            let code = if error.trouble == Trouble::Corrupt { corrupt } else { ErrorCode::UnsupportedFormat };
            DriverError::new(code, error.text).at(number, 0)
        })?;
        let image = Self { device: number, header, file_length, corrupt };
        let ImageInfo { virtual_size, cluster_size } = image.info();
        if (virtual_size, cluster_size) != (device.virtual_size, device.cluster_size) {
            let text = format!(
                "the header says {virtual_size} bytes in blocks of {cluster_size}, the host saw {} and {}",
                device.virtual_size, device.cluster_size
            );
            return Err(DriverError::new(ErrorCode::HeaderMismatch, text).at(number, 0));
        }
        if let Some(why) = image.header.contradiction() {
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, why).at(number, 0));
        }
        let map = image.header.map_offset;
        if checked_end(map, image.header.map_bytes(), file_length).is_none() {
            return Err(image.corrupt(map, "the map goes past the end of the file"));
        }
        Ok(image)
    }

    pub fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.header.virtual_size(), cluster_size: self.header.block_size }
    }

    /// What no image may say, at byte `offset`.
    pub fn corrupt(&self, offset: u64, text: impl Into<String>) -> DriverError {
        DriverError::new(self.corrupt, text).at(self.device, offset)
    }

    /// Blocks of the disk. The map may have more entries than that.
    pub fn disk_blocks(&self) -> u32 {
        u32::try_from(self.header.virtual_size().div_ceil(self.header.block_size)).unwrap_or(u32::MAX)
    }

    /// The disk and its blocks.
    pub fn disk(&self) -> Disk {
        Disk { size: self.header.virtual_size(), cluster: self.header.block_size }
    }

    /// Whether any of a slot's data lies in the file. The last block may be cut short: the rest reads as zeroes.
    pub fn holds_slot(&self, slot: u32) -> bool {
        self.header.slot_offset(slot) < self.file_length
    }

    /// How many slots the file has room for, and one more for what it has of the next.
    pub fn slots_in_file(&self) -> u64 {
        self.file_length.saturating_sub(self.header.data_offset).div_ceil(self.header.stride())
    }

    /// Where the first `slots` slots end in the file.
    pub fn data_end(&self, slots: u64) -> Option<u64> {
        slots.checked_mul(self.header.stride())?.checked_add(self.header.data_offset)
    }

    /// Write the fields of the header that this driver changes, in one write within a sector.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write_header(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        let range = self.header.update();
        out.write(io, range.start as u64, self.header.bytes.get(range).unwrap_or_default())
    }
}
