//! An open image: its header, and what entries of its BAT may name.

use alloc::format;
use alloc::string::String;
use core::ops::Range;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, ImageInfo};
use instar_guest_sdk::table::Disk;
use instar_guest_sdk::{checked_end, BlockIo, DriverError, DriverResult};
use instar_parallels_format::{Header, Trouble, HEADER_BYTES, SECTOR};

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

/// A cluster of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The byte of the file at which it begins.
    pub offset: u64,
    /// Its number among the clusters of the file, by which two at one place are told.
    pub slot: u64,
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
                "the header says {virtual_size} bytes in clusters of {cluster_size}, the host saw {} and {}",
                device.virtual_size, device.cluster_size
            );
            return Err(DriverError::new(ErrorCode::HeaderMismatch, text).at(number, 0));
        }
        if header.bat_end() > file_length {
            return Err(image.corrupt(HEADER_BYTES as u64, "the BAT goes past the end of the file"));
        }
        if header.data_off != 0 && header.data_start() > file_length.next_multiple_of(SECTOR) {
            let text = format!("data_off is sector {}, past the end of the file", header.data_off);
            return Err(image.corrupt(0, text));
        }
        Ok(image)
    }

    pub fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.header.virtual_size(), cluster_size: self.header.unit() }
    }

    /// The disk with this size in bytes: what the image has, or will have.
    pub fn disk(&self, size: u64) -> Disk {
        Disk { size, cluster: self.header.cluster_bytes() }
    }

    /// The BAT as bytes of the file.
    pub fn bat(&self) -> Range<u64> {
        Header::entry_place(0)..self.header.bat_end()
    }

    /// How many of the clusters that the image is said to have make up one that it has.
    pub fn units(&self) -> u64 {
        self.header.cluster_bytes() / self.header.unit()
    }

    /// The same for a cluster of the disk, without what of it lies past the end.
    pub fn units_of(&self, cluster: u64) -> u64 {
        let start = cluster.saturating_mul(self.header.cluster_bytes());
        let rest = self.header.virtual_size().saturating_sub(start);
        rest.min(self.header.cluster_bytes()).div_ceil(self.header.unit())
    }

    /// What no image may say, at byte `offset`.
    pub fn corrupt(&self, offset: u64, text: impl Into<String>) -> DriverError {
        DriverError::new(self.corrupt, text).at(self.device, offset)
    }

    /// How many clusters the file has room for, and one more for what it has of the next.
    pub fn slots_in_file(&self) -> u64 {
        self.file_length.div_ceil(self.header.cluster_bytes())
    }

    /// Where the cluster of an entry lies that is not 0. The specification ("BAT") wants it behind the start of the data, at a
    /// whole number of clusters from there, and in the file. QEMU reads clusters anywhere, and drops those that do not lie in
    /// the file as a whole when it repairs an image.
    ///
    /// # Errors
    /// A clause that says what is wrong.
    pub fn place(&self, entry: u32) -> Result<Place, String> {
        let offset = self.header.offset(entry);
        let Some(slot) = self.header.slot(offset) else {
            let why = if offset < self.header.floor() { "in front of the data" } else { "not the start of a cluster" };
            return Err(format!("entry {entry} names offset {offset}, which is {why}"));
        };
        if checked_end(offset, self.header.cluster_bytes(), self.file_length).is_none() {
            return Err(format!(
                "entry {entry} names the cluster at offset {offset}, which goes past the end of the file"
            ));
        }
        Ok(Place { offset, slot })
    }
}
