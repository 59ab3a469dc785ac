//! An open image: header, descriptor and grain directories.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, ImageInfo};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_vmdk_format::{
    flags, Descriptor, FormatError, Header, Trouble, FOOTER_BYTES, HEADER_BYTES, MAX_DESCRIPTOR_BYTES, SECTOR,
};

/// An open image. Its memory: the grain directories, 1 MiB each at most.
#[derive(Debug)]
pub struct Image {
    pub device: u32,
    pub header: Header,
    /// Length of the file in bytes.
    pub file_length: u64,
    pub descriptor: Descriptor,
    /// The grain directory: sectors of the grain tables, 0 for a table that is not there.
    pub directory: Vec<u32>,
    /// The second one.
    pub redundant: Option<Vec<u32>>,
    /// There is a footer, at the end of the file.
    pub footer: bool,
    corrupt: ErrorCode,
}

/// An arithmetic guard.
pub fn overflow(what: &str) -> DriverError {
    DriverError::new(ErrorCode::InternalOverflow, format!("{what} is out of range"))
}

impl Image {
    /// Read header, descriptor and directories. `corrupt` is the code of what no image may say.
    ///
    /// # Errors
    /// [`ErrorCode::HeaderMismatch`] when the image is not what the host saw; corruption; I/O errors.
    pub fn open(io: &mut dyn BlockIo, device: &DeviceConfig, corrupt: ErrorCode) -> DriverResult<Self> {
        let (number, file_length) = (device.device, device.file_length);
        let at = |offset: u64| {
            move |error: FormatError| {
                let code = if error.trouble == Trouble::Corrupt { corrupt } else { ErrorCode::UnsupportedFormat };
                DriverError::new(code, error.text).at(number, offset)
            }
        };
        let mut bytes = [0; HEADER_BYTES];
        io.read(number, 0, &mut bytes)?;
        let mut header = Header::parse(&bytes).map_err(at(0))?;
        let (text_at, text_length) = (header.descriptor_offset, header.descriptor_size);
        let footer = header.directory_is_at_the_end();
        if footer {
            let start = file_length.checked_sub(FOOTER_BYTES as u64).ok_or_else(|| overflow("the footer"))?;
            let mut bytes = [0; FOOTER_BYTES];
            io.read(number, start, &mut bytes)?;
            header = Header::parse_footer(&bytes).map_err(at(start))?;
            // The descriptor's place is that of the header in front.
            (header.descriptor_offset, header.descriptor_size) = (text_at, text_length);
        }
        if header.virtual_size() != device.virtual_size || header.grain_bytes() != device.cluster_size {
            let text = format!(
                "the header says {} bytes with grains of {}, the host saw {} and {}",
                header.virtual_size(),
                header.grain_bytes(),
                device.virtual_size,
                device.cluster_size
            );
            return Err(DriverError::new(ErrorCode::HeaderMismatch, text).at(number, 0));
        }
        let text = inside(text_at, text_length.checked_mul(SECTOR), file_length)
            .filter(|&(_, length)| length <= MAX_DESCRIPTOR_BYTES)
            .and_then(|(offset, length)| Some((offset, usize::try_from(length).ok()?)));
        let (offset, length) = text.ok_or_else(|| {
            DriverError::new(corrupt, "the descriptor lies past the end of the file, or is too long").at(number, 28)
        })?;
        let mut text = vec![0; length];
        io.read(number, offset, &mut text)?;
        let descriptor = Descriptor::parse(&text).map_err(at(offset))?;

        let mut image = Self {
            device: number,
            header,
            file_length,
            descriptor,
            directory: Vec::new(),
            redundant: None,
            footer,
            corrupt,
        };
        image.directory = image.read_directory(io, header.directory, "grain directory")?;
        if header.has(flags::REDUNDANT) {
            image.redundant =
                Some(image.read_directory(io, header.redundant_directory, "redundant grain directory")?);
        }
        Ok(image)
    }

    fn read_directory(&self, io: &mut dyn BlockIo, sector: u64, name: &str) -> DriverResult<Vec<u32>> {
        let entries = self.header.directory_entries();
        let place = inside(sector, entries.checked_mul(4), self.file_length).filter(|_| sector != 0);
        let Some((offset, length)) = place else {
            return Err(self.corrupt(0, format!("the {name} at sector {sector} lies past the end of the file")));
        };
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| overflow(name))?];
        io.read(self.device, offset, &mut bytes)?;
        let directory: Vec<u32> = entries_of(&bytes).collect();
        Ok(directory)
    }

    /// What no image may say, at byte `offset`.
    pub fn corrupt(&self, offset: u64, text: impl Into<String>) -> DriverError {
        DriverError::new(self.corrupt, text).at(self.device, offset)
    }

    pub fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.header.virtual_size(), cluster_size: self.header.grain_bytes() }
    }

    /// Whether entry 1 means zeroes.
    pub fn zeroed_grains(&self) -> bool {
        self.header.has(flags::ZEROED_GRAINS)
    }

    pub fn compressed(&self) -> bool {
        self.header.has(flags::COMPRESSED)
    }
}

/// The entries of a directory or table.
pub fn entries_of(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|entry| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]))
}

/// Byte offset and length of something at a sector, if it lies inside the file.
fn inside(sector: u64, length: Option<u64>, file_length: u64) -> Option<(u64, u64)> {
    let (offset, length) = (sector.checked_mul(SECTOR)?, length?);
    offset.checked_add(length).filter(|&end| end <= file_length)?;
    Some((offset, length))
}
