//! Growth of a hosted sparse extent, up to the one sector that switches it: its header.
//!
//! 1. tables for the new part of the disk, empty, go behind the end of the file, in both copies: QEMU writes to no part of a
//!    disk that has no table. Where the directories have no room for them, longer copies of both go there, too; otherwise the
//!    new entries go behind the old ones. *Flush*. Nobody looks at any of that yet: the header gives the length;
//! 2. what the last table and the last grain say of what lies past the old end, and what shows there from below, becomes zeroes,
//!    in the usual order of writing. *Flush*. None of it lies on the disk of the old size;
//! 3. the header, one sector, says how large the disk is and where the directories are.
//!
//! A crash before the header is written leaves the old disk and lost space.

use crate::growth::SparseGrowth;
use crate::image::{Directory, Image};
use crate::sparse_sink::{Space, SparseSink};
use crate::work::Groups;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, ReadBelow};
use instar_vmdk_format::{HeaderGrowth, Layout, HEADER_BYTES, MAX_DIRECTORY, SECTOR};

/// A refusal.
fn refused(text: impl Into<alloc::string::String>) -> DriverError {
    DriverError { device: Some(DEVICE_OUTPUT), ..DriverError::new(ErrorCode::UnsupportedFormat, text) }
}

impl SparseSink {
    /// Verify that the extent can grow to `size` bytes, over something that reads as zeroes from `below_length` on, and count
    /// that. From now on, memory has the larger disk.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if it cannot; corruption and I/O errors.
    pub fn grow(&mut self, io: &mut dyn BlockIo, size: u64, below_length: u64) -> DriverResult<()> {
        let old = self.image.layout;
        if old.next_free.is_some() {
            return Err(refused(
                "a delta disk of ESX (COWD) has to be as large as its parent: let ESX make its base larger, and a new snapshot",
            ));
        }
        if old.compressed || self.image.footer {
            return Err(refused(
                "a streamOptimized vmdk does not grow, for it is written once: convert it with -O vmdk, resize that image, and \
                 convert the result with -O vmdk -o subformat=streamOptimized",
            ));
        }
        let capacity = size / SECTOR;
        let mut layout = Layout { capacity, ..old };
        layout.directory_sectors = layout.directory_entries().saturating_mul(4).div_ceil(SECTOR);
        if layout.directory_entries() > MAX_DIRECTORY {
            let most = MAX_DIRECTORY.saturating_mul(old.table_coverage());
            return Err(refused(format!("a sparse extent of such grains has at most {most} bytes")));
        }
        self.planner.verify(io, &self.image)?;
        let count = usize::try_from(layout.directory_entries()).map_err(|_| overflow("a grain directory"))?;
        let bytes = layout.directory_entries().saturating_mul(8);
        self.image.need(io, bytes, "grain directory")?;
        let from = self.image.directory.entries.len();
        // The rest of the last sector of a directory is nobody else's.
        let moves = layout.directory_sectors > old.directory_sectors;
        let end = place(&mut self.image, &mut layout, &mut self.space, count, moves)?;
        let old_size = old.virtual_size();
        let tables_end = (from as u64).saturating_mul(old.table_coverage());
        let hidden = old_size..size.min(below_length.max(tables_end)).max(old_size);
        self.image.layout = layout;
        self.image.unwritten = from;
        self.planner.grow(end, below_length);
        self.growth = Some(SparseGrowth { from, moves, hidden: hidden.clone(), end });
        if hidden.is_empty() {
            return Ok(());
        }
        self.planner.plan(io, &self.image, &[Extent::zero(hidden.start, hidden.end - hidden.start)])
    }

    /// Do everything but writing the header, durably. Returns what that is to say; `None` if the extent does not grow.
    ///
    /// # Errors
    /// I/O errors.
    pub fn prepare_growth(
        &mut self,
        io: &mut dyn BlockIo,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<Option<HeaderGrowth>> {
        let Some(SparseGrowth { from, moves, hidden, end }) = self.growth.take() else { return Ok(None) };
        if end > self.image.file_length {
            self.out.set_length(io, end)?;
            self.image.file_length = end;
        }
        let first = if moves { 0 } else { from };
        for directory in self.image.directories() {
            let entries = directory.entries.get(first..).unwrap_or_default();
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            if !bytes.is_empty() {
                self.out.write(io, directory.sector * SECTOR + first as u64 * 4, &bytes)?;
            }
        }
        self.out.barrier(io)?;
        self.image.unwritten = usize::MAX;
        if !hidden.is_empty() {
            let zeroes = [Extent::zero(hidden.start, hidden.end - hidden.start)];
            let mut groups = Groups::of(&zeroes);
            while let Some(group) = groups.next(&self.image)? {
                self.write_group(io, &group, below)?;
            }
            self.out.barrier(io)?;
        }
        let Layout { capacity, directory, redundant_directory, .. } = self.image.layout;
        Ok(Some(HeaderGrowth { capacity, directory, redundant_directory }))
    }

    /// The header as it stands in the file.
    ///
    /// # Errors
    /// I/O errors.
    pub fn header(&self, io: &mut dyn BlockIo) -> DriverResult<[u8; HEADER_BYTES]> {
        let mut bytes = [0; HEADER_BYTES];
        io.read(self.image.device, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Have the header say this, durably.
    ///
    /// # Errors
    /// I/O errors.
    pub fn switch(&mut self, io: &mut dyn BlockIo, growth: &HeaderGrowth) -> DriverResult<()> {
        let header = growth.apply(&self.header(io)?);
        self.out.write(io, 0, &header)?;
        self.out.barrier(io)
    }
}

/// Find places behind the end of the file: for both directories if they are `moved`, and for the tables up to `count`. Memory has
/// them now. Returns the first byte behind all of that.
fn place(image: &mut Image, layout: &mut Layout, space: &mut Space, count: usize, moved: bool) -> DriverResult<u64> {
    let too_long = |_| refused("the file would be longer than the 2 TiB that its tables can name");
    let (directory_bytes, table_bytes) = (layout.directory_sectors.saturating_mul(SECTOR), layout.table_bytes());
    for directory in image.directories_mut() {
        if moved {
            directory.sector = space.take(directory_bytes).map_err(too_long)?.into();
        }
        let new = count.saturating_sub(directory.entries.len());
        directory.entries.reserve_exact(new);
        for _ in 0..new {
            directory.entries.push(space.take(table_bytes).map_err(too_long)?);
        }
    }
    layout.directory = image.directory.sector;
    layout.redundant_directory = image.redundant.as_ref().map(|directory: &Directory| directory.sector);
    space.align(layout.alignment())?;
    Ok(space.0)
}
