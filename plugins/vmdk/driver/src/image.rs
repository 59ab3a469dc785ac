//! An open sparse extent, hosted or of ESX: header and grain directories.

use crate::failures::at;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, FileDevice};
use instar_guest_sdk::table::{Action, Arrival, Held, ZeroEntries};
use instar_guest_sdk::{checked_end, overflow, BlockIo, DriverError, DriverResult};
use instar_vmdk_format::{
    entries, CowdHeader, Grain, Header, Layout, Metadata, COWD_HEADER_BYTES, FOOTER_BYTES, HEADER_BYTES,
    MAX_DESCRIPTOR_BYTES, SECTOR, UNCLEAN_SHUTDOWN,
};

/// An open sparse extent. Its memory: the grain directories, 1 MiB each at most, or the one of an extent of ESX, 4 MiB at most.
#[derive(Debug)]
pub struct Image {
    pub device: u32,
    pub layout: Layout,
    /// Length of the file in bytes.
    pub file_length: u64,
    pub directory: Directory,
    /// The second one.
    pub redundant: Option<Directory>,
    /// There is a footer, at the end of the file.
    pub footer: bool,
    /// The header says that the extent was not closed. QEMU neither reads nor sets that.
    pub unclean: bool,
    /// What the tables of the first directory cannot mean is taken from those of the second: see [`crate::copies`].
    pub merges: bool,
    /// The first table that the file is yet to get, while the disk is about to grow: it is empty.
    pub unwritten: usize,
    corrupt: ErrorCode,
}

/// A grain directory.
#[derive(Debug, Default)]
pub struct Directory {
    /// Where it begins in the file, in sectors.
    pub sector: u64,
    /// The sectors of the grain tables, 0 for a table that is not there.
    pub entries: Vec<u32>,
}

impl Directory {
    /// The indices of the tables that are there.
    pub fn present(&self) -> impl Iterator<Item = usize> + '_ {
        self.entries.iter().enumerate().filter(|(_, &sector)| sector != 0).map(|(index, _)| index)
    }
}

/// Bytes of the heap that must be left once an image is open: for the tables that are worked on at once, in both copies, a
/// window of the check, what is read from below or decoded.
const WORKING_ROOM: u64 = 24 << 20;

impl Image {
    /// Read header and directories of a hosted extent. `corrupt` is the code of what no image may say.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn open_hosted(io: &mut dyn BlockIo, device: &FileDevice, corrupt: ErrorCode) -> DriverResult<Self> {
        let (number, file_length) = (device.device, device.file_length);
        let mut bytes = [0; HEADER_BYTES];
        io.read(number, 0, &mut bytes)?;
        let mut header = Header::parse(&bytes).map_err(at(corrupt, number, 0))?;
        let footer = header.directory_is_at_the_end();
        if footer {
            let start = file_length.checked_sub(FOOTER_BYTES as u64).ok_or_else(|| overflow("the footer"))?;
            let mut bytes = [0; FOOTER_BYTES];
            io.read(number, start, &mut bytes)?;
            header = header.with_footer(&bytes).map_err(at(corrupt, number, start))?;
        }
        let mut image = Self::of(device, header.layout(), footer, corrupt);
        image.unclean = bytes.get(UNCLEAN_SHUTDOWN).is_some_and(|&mark| mark != 0);
        if header.descriptor_size != 0 {
            image.descriptor_range()?;
        }
        if header.overhead.checked_mul(SECTOR).is_none_or(|grains| grains > file_length) {
            return Err(image.corrupt(64, "the grains begin past the end of the file (overHead)"));
        }
        image.read_directories(io)?;
        if image.layout.compressed {
            // A grain, its stream of up to twice that, and both once more while one is replaced.
            image.need(io, header.grain_bytes().saturating_mul(6), "decoding of a compressed grain")?;
        }
        Ok(image)
    }

    /// Read header and directory of an extent of ESX. `corrupt` is the code of what no image may say.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn open_cowd(io: &mut dyn BlockIo, device: &FileDevice, corrupt: ErrorCode) -> DriverResult<Self> {
        let mut bytes = [0; COWD_HEADER_BYTES];
        io.read(device.device, 0, &mut bytes)?;
        let header = CowdHeader::parse(&bytes).map_err(at(corrupt, device.device, 0))?;
        let mut image = Self::of(device, header.layout(), false, corrupt);
        if image.layout.overhead.checked_mul(SECTOR).is_none_or(|end| end > image.file_length) {
            return Err(image.corrupt(20, "the grain directory goes past the end of the file"));
        }
        image.read_directories(io)?;
        Ok(image)
    }

    fn of(device: &FileDevice, layout: Layout, footer: bool, corrupt: ErrorCode) -> Self {
        let FileDevice { device, file_length, .. } = *device;
        let (directory, unwritten) = (Directory::default(), usize::MAX);
        let (unclean, merges, redundant) = (false, false, None);
        Self { device, layout, file_length, directory, redundant, footer, unclean, merges, unwritten, corrupt }
    }

    fn read_directories(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.directory = self.read_directory(io, self.layout.directory, "grain directory")?;
        if let Some(redundant) = self.layout.redundant_directory {
            self.redundant = Some(self.read_directory(io, redundant, "redundant grain directory")?);
        }
        Ok(())
    }

    /// The directories, of which the first one counts.
    pub fn directories(&self) -> impl Iterator<Item = &Directory> + Clone {
        core::iter::once(&self.directory).chain(&self.redundant)
    }

    /// The same, to be changed in memory.
    pub fn directories_mut(&mut self) -> impl Iterator<Item = &mut Directory> {
        core::iter::once(&mut self.directory).chain(&mut self.redundant)
    }

    /// What is done about a grain. `below`: something may show through where the image has nothing.
    pub fn decide(&self, grain: Grain, arrival: Arrival, below: bool) -> Action<u64> {
        let zeroes = if self.layout.zeroed_grains { ZeroEntries::Anywhere } else { ZeroEntries::Never };
        let held = match grain {
            Grain::Absent => Held::Nothing,
            Grain::Zero => Held::Zero,
            Grain::At(offset) => Held::At(offset),
        };
        held.decide(arrival, zeroes, below)
    }

    /// Everything but tables and grains.
    pub fn fixed_metadata(&self) -> Vec<Metadata> {
        let mut parts = self.layout.fixed_metadata();
        if self.footer {
            let (end, sectors) = (self.file_length / SECTOR, FOOTER_BYTES as u64 / SECTOR);
            parts.push((end.saturating_sub(sectors)..end, "footer"));
        }
        parts
    }

    /// Byte offset and length of the embedded descriptor.
    ///
    /// # Errors
    /// When it lies outside the file, or is longer than any.
    pub fn descriptor_range(&self) -> DriverResult<(u64, u64)> {
        let Layout { descriptor_offset, descriptor_size, .. } = self.layout;
        let place = inside(descriptor_offset, descriptor_size.checked_mul(SECTOR), self.file_length);
        place
            .filter(|&(_, length)| length <= MAX_DESCRIPTOR_BYTES)
            .ok_or_else(|| self.corrupt(28, "the descriptor lies past the end of the file, or is too long"))
    }

    /// Where the embedded descriptor belongs, which a crash may have left elsewhere: behind the header, in front of whatever
    /// comes next; byte offset and bytes.
    pub fn descriptor_home(&self) -> (u64, u64) {
        let Layout { descriptor_offset, descriptor_size, header, overhead, .. } = self.layout;
        let tables = self.directories().flat_map(|directory| directory.entries.iter().map(|&sector| sector.into()));
        let others =
            self.fixed_metadata().into_iter().filter(|(_, what)| *what != "descriptor").map(|(at, _)| at.start);
        let end = tables.chain(others).chain([overhead]).filter(|&sector| sector >= header).min().unwrap_or(header);
        let home =
            if descriptor_offset < overhead { (descriptor_offset, descriptor_size) } else { (header, end - header) };
        (home.0 * SECTOR, home.1 * SECTOR)
    }

    fn read_directory(&self, io: &mut dyn BlockIo, sector: u64, name: &str) -> DriverResult<Directory> {
        let count = self.layout.directory_entries();
        let place = inside(sector, count.checked_mul(4), self.file_length).filter(|_| sector != 0);
        let Some((offset, length)) = place else {
            return Err(self.corrupt(0, format!("the {name} at sector {sector} lies past the end of the file")));
        };
        // The bytes, and the entries made of them.
        self.need(io, length.saturating_mul(2), name)?;
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| overflow(name))?];
        io.read(self.device, offset, &mut bytes)?;
        Ok(Directory { sector, entries: entries(&bytes).collect() })
    }

    /// Make sure that `bytes` can be taken from the heap for something, beside what work needs afterwards: an allocation
    /// that fails ends the guest, perhaps when the backing is written already.
    pub fn need(&self, io: &dyn BlockIo, bytes: u64, what: &str) -> DriverResult<()> {
        let free = io.heap_free() as u64;
        if bytes.saturating_add(WORKING_ROOM) <= free {
            return Ok(());
        }
        let text = format!("the {what} takes {bytes} bytes, and of the memory of the sandbox {free} are free");
        Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(self.device, 0))
    }

    /// What no image may say, at byte `offset`.
    pub fn corrupt(&self, offset: u64, text: impl Into<String>) -> DriverError {
        DriverError::new(self.corrupt, text).at(self.device, offset)
    }
}

/// Byte offset and length of something at a sector, if it lies inside the file.
fn inside(sector: u64, length: Option<u64>, file_length: u64) -> Option<(u64, u64)> {
    let (offset, length) = (sector.checked_mul(SECTOR)?, length?);
    checked_end(offset, length, file_length)?;
    Some((offset, length))
}
