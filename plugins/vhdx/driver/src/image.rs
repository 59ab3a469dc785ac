//! An open image, seen through its log: where everything stands in the file.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, ImageInfo};
use instar_guest_sdk::{checked_end, overflow, BlockIo, DriverError, DriverResult};
use instar_vhdx_format::{Entry, FormatError, Layout, LoadError, Opened, State, Trouble, BITMAP_BLOCK};

/// An open image.
#[derive(Debug)]
pub struct Image {
    pub device: u32,
    /// The device cannot change its length.
    pub fixed_length: bool,
    /// Length of the file in bytes as it is, without what the log does to it.
    pub real_length: u64,
    pub opened: Opened,
    pub layout: Layout,
    /// Where no block may be.
    taken: Vec<(Range<u64>, &'static str)>,
    /// The code of what no image may say.
    corrupt: ErrorCode,
}

/// Where a payload block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Not here: zeroes without a parent, the parent's bytes with one.
    Nowhere,
    /// It is zeroes, whatever the parent has.
    Zero,
    /// At this byte of the file.
    Whole(u64),
    /// At this byte of the file, as far as its bitmap says so.
    Partial(u64),
}

impl Image {
    /// Read everything but the block allocation table. `corrupt` is the code of what no image may say.
    ///
    /// # Errors
    /// Corruption, metadata that is not what the host has seen, and I/O errors.
    pub fn open(io: &mut dyn BlockIo, device: &DeviceConfig, corrupt: ErrorCode) -> DriverResult<Self> {
        let number = device.device;
        let opened = Opened::load(device.file_length, &mut |offset, bytes| io.read(number, offset, bytes));
        let opened = opened.map_err(|error| match error {
            LoadError::Read(error) => error,
            LoadError::Format(FormatError { trouble, offset, text }) => {
                let code = if trouble == Trouble::Corrupt { corrupt } else { ErrorCode::UnsupportedFormat };
                DriverError::new(code, text).at(number, offset)
            }
        })?;
        let layout = opened.layout();
        if (layout.size, layout.block_size) != (device.virtual_size, device.cluster_size) {
            let text = "the metadata has changed since the host has seen it";
            return Err(DriverError::new(ErrorCode::HeaderMismatch, text).at(number, opened.metadata_region.offset));
        }
        let fixed_length = device.flags & device_flags::FIXED_LENGTH != 0;
        let (real_length, taken) = (device.file_length, opened.taken());
        Ok(Self { device: number, fixed_length, real_length, opened, layout, taken, corrupt })
    }

    /// What the operation knows of it.
    pub fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.layout.size, cluster_size: self.layout.block_size }
    }

    /// What no image may say, at byte `offset`.
    pub fn corrupt(&self, offset: u64, text: impl Into<String>) -> DriverError {
        DriverError::new(self.corrupt, text).at(self.device, offset)
    }

    /// Read metadata, through the log.
    ///
    /// # Errors
    /// I/O errors.
    pub fn read(&self, io: &mut dyn BlockIo, offset: u64, bytes: &mut [u8]) -> DriverResult<()> {
        io.read(self.device, offset, bytes)?;
        self.see(offset, bytes);
        Ok(())
    }

    /// Apply what the log does to bytes that were read at `offset`.
    pub fn see(&self, offset: u64, bytes: &mut [u8]) {
        if let Some(replay) = &self.opened.replay {
            replay.apply(offset, bytes);
        }
    }

    /// Whether the log changes any of these bytes of the file.
    pub fn is_logged(&self, range: &Range<u64>) -> bool {
        self.opened.replay.as_ref().is_some_and(|replay| replay.touches(range))
    }

    /// Byte offset in the file of an entry of the block allocation table.
    pub fn entry_place(&self, entry: u64) -> u64 {
        // Within the region, which was looked at.
        self.opened.bat.offset.saturating_add(entry.saturating_mul(8))
    }

    /// Where a payload block is, by its entry.
    ///
    /// # Errors
    /// Corruption, if no entry may say that, or if any of the block that belongs to the disk is not in the file, or is
    /// something else.
    pub fn block_place(&self, block: u64, entry: Entry) -> DriverResult<Place> {
        let at = || self.entry_place(self.layout.payload_entry(block));
        let state = entry.state().filter(|state| *state != State::PartiallyPresent || self.layout.has_parent);
        let place = match state {
            None => {
                let text =
                    format!("the entry of block {block} is {:#x}, which no entry of such a disk may be", entry.0);
                return Err(self.corrupt(at(), text));
            }
            Some(State::NotPresent) => return Ok(Place::Nowhere),
            Some(State::Zero | State::Undefined | State::Unmapped) => return Ok(Place::Zero),
            Some(State::FullyPresent) => Place::Whole(entry.offset()),
            Some(State::PartiallyPresent) => Place::Partial(entry.offset()),
        };
        let (offset, length) = (entry.offset(), self.layout.visible(block));
        self.verify_block(offset, (length, self.layout.block_size), at(), &|| format!("block {block}"))?;
        let range = offset..offset.saturating_add(length);
        if self.is_logged(&range) {
            // "The log … MUST NOT be used for updates to the payload blocks" (2.3).
            return Err(self.corrupt(at(), format!("the log changes bytes of block {block}, which is no metadata")));
        }
        Ok(place)
    }

    /// Where the sector bitmap block of a payload block is, by its entry; `None` if it is not there.
    ///
    /// # Errors
    /// As [`Image::block_place`].
    pub fn bitmap_place(&self, block: u64, entry: Entry) -> DriverResult<Option<u64>> {
        let at = self.entry_place(self.layout.bitmap_entry(block));
        let what = || format!("the sector bitmap of the chunk at block {block}");
        match entry.has_bitmap().filter(|present| !present || self.layout.has_parent) {
            None => {
                let text = format!("the entry of {} is {:#x}, which no entry of such a disk may be", what(), entry.0);
                Err(self.corrupt(at, text))
            }
            Some(false) => Ok(None),
            Some(true) => {
                self.verify_block(entry.offset(), (BITMAP_BLOCK, BITMAP_BLOCK), at, &what)?;
                Ok(Some(entry.offset()))
            }
        }
    }

    /// Verify that the `needed` bytes of a block are in the file, and that none of its `length` bytes are anything else.
    fn verify_block(
        &self,
        offset: u64,
        (needed, length): (u64, u64),
        entry: u64,
        what: &dyn Fn() -> String,
    ) -> DriverResult<()> {
        if checked_end(offset, needed, self.opened.file_length).is_none() {
            let text = format!("{}, at byte {offset}, goes past the end of the file", what());
            return Err(self.corrupt(entry, text));
        }
        let end = offset.saturating_add(length);
        match self.taken.iter().find(|(range, _)| range.start < end && offset < range.end) {
            None => Ok(()),
            Some((range, other)) => {
                let text = format!("{}, at byte {offset}, overlaps the {other} at byte {}", what(), range.start);
                Err(self.corrupt(entry, text))
            }
        }
    }

    /// Everything but blocks, ascending.
    pub fn taken(&self) -> &[(Range<u64>, &'static str)] {
        &self.taken
    }

    /// The end of everything but blocks, in bytes: whole MiB.
    pub fn metadata_end(&self) -> u64 {
        self.taken.iter().map(|(range, _)| range.end).max().unwrap_or(0)
    }

    /// The disk has another size now, or its table another place.
    pub fn changed(&mut self) {
        (self.layout, self.taken) = (self.opened.layout(), self.opened.taken());
    }

    /// The bytes of a number as a size in memory.
    pub fn in_memory(bytes: u64) -> DriverResult<usize> {
        usize::try_from(bytes).map_err(|_| overflow("a size in memory"))
    }
}
