//! Planning what is written into a sparse extent: how many grains and tables are new, and how long the file becomes. Nothing is
//! changed.

use crate::check::Verified;
use crate::decode::GrainReader;
use crate::image::{Directory, Image};
use crate::work::{grains, GrainPart, Group, Groups};
use alloc::format;
use alloc::vec;
use instar_guest_sdk::abi::{device_flags, ErrorCode, FileDevice, PlanSummary};
use instar_guest_sdk::table::Action;
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent};
use instar_vmdk_format::{FOOTER_BYTES, SECTOR};

/// An entry that stands for a grain which is yet to get its place, while planning.
const PLANNED: u32 = u32::MAX;

/// What planning counted, and the bounds that hold.
#[derive(Debug, Default)]
pub struct Planner {
    /// Where the first new grain goes, in bytes, at a multiple of [`Layout::alignment`](instar_vmdk_format::Layout::alignment).
    pub first_free: u64,
    max_length: u64,
    /// The device cannot change its length.
    fixed: bool,
    has_backing: bool,
    /// From this guest byte on, nothing shows from below: of a disk that grows.
    pub below_end: u64,
    /// The first byte behind all that growth adds to the file; 0 if the disk does not grow.
    grown_end: u64,
    verified: Option<Verified>,
    grains: u64,
    /// Copies of tables that are missing.
    copies: u64,
    /// Tables of which a copy is missing.
    tables: u64,
    /// The first guest byte of the last grain that was counted, and the last table.
    last_grain: Option<u64>,
    last_table: Option<usize>,
    /// Reads the compressed grains that are there already.
    reader: GrainReader,
}

impl Planner {
    /// Nothing was planned yet for this image.
    ///
    /// # Errors
    /// An arithmetic guard.
    pub fn of(image: &Image, file: &FileDevice, has_backing: bool) -> DriverResult<Self> {
        // QEMU leaves the number of the first free sector as it is when it writes: what it has added lies behind.
        let free = image.layout.next_free.unwrap_or(0).saturating_mul(SECTOR);
        // The footer is not needed any more once the header says what it does. What is stored of a compressed grain covers it;
        // of a plain one, what is zero is not written.
        let footer = if image.footer && image.layout.compressed { FOOTER_BYTES as u64 } else { 0 };
        let end = image.file_length.saturating_sub(footer);
        let first_free = end.max(free).checked_next_multiple_of(image.layout.alignment());
        let first_free = first_free.ok_or_else(|| overflow("the length of the file"))?;
        let fixed = file.flags & device_flags::FIXED_LENGTH != 0;
        let (max_length, below_end) = (file.max_length, u64::MAX);
        Ok(Self { first_free, max_length, fixed, has_backing, below_end, ..Self::default() })
    }

    /// The disk grows: new grains begin at `end`, and nothing shows from below from guest byte `below_end` on.
    pub fn grow(&mut self, end: u64, below_end: u64) {
        (self.first_free, self.grown_end, self.below_end) = (end, end, below_end);
    }

    /// Verify the metadata, once.
    ///
    /// # Errors
    /// Corruption and I/O errors.
    pub fn verify(&mut self, io: &mut dyn BlockIo, image: &Image) -> DriverResult<()> {
        if self.verified.is_none() {
            self.verified = Some(image.verify(io)?);
        }
        Ok(())
    }

    /// The first byte behind all that is in use, of an extent of ESX whose first free sector lies in front of that, because
    /// QEMU has written to it: ESX would write over the rest.
    pub fn stale_end(&self, image: &Image) -> Option<u64> {
        let (free, end) = image.layout.next_free.zip(self.verified.map(|found| found.end))?;
        (free < end).then_some(end.saturating_mul(SECTOR))
    }

    fn plan_group(&mut self, io: &mut dyn BlockIo, image: &Image, group: &Group) -> DriverResult<()> {
        let mut tables = image.read_both(io, &group.tables)?;
        for piece in &group.pieces {
            let table = tables.get_mut(piece.slot).ok_or_else(|| overflow("a table"))?;
            for part in grains(image, piece)? {
                let slot = table.entries.get_mut(part.entry).ok_or_else(|| overflow("an entry"))?;
                // A grain that two calls have a part in is counted once.
                if self.last_grain == Some(part.grain) {
                    continue;
                }
                let below = self.has_backing && part.grain < self.below_end;
                match image.decide(image.layout.grain_of(*slot), part.arrival, below) {
                    Action::InPlace(offset) if image.layout.compressed => {
                        self.holds(io, image, offset, &part)?;
                        continue;
                    }
                    Action::Nothing | Action::InPlace(_) => continue,
                    Action::Allocate => {
                        self.grains += 1;
                        *slot = PLANNED;
                    }
                    Action::MarkZero(_) => *slot = 1,
                }
                self.last_grain = Some(part.grain);
                table.dirty = true;
            }
        }
        for table in tables.iter().filter(|table| table.dirty) {
            if self.last_table != Some(table.index) {
                self.last_table = Some(table.index);
                let missing = |directory: &&Directory| directory.entries.get(table.index) == Some(&0);
                let missing = image.directories().filter(missing).count() as u64;
                self.copies += missing;
                self.tables += u64::from(missing > 0);
            }
        }
        Ok(())
    }

    /// See to it that the compressed grain at byte `offset` of the file holds what arrives for a part of it already: a commit
    /// that was interrupted has written it, and is run again.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if it holds something else; corruption and I/O errors.
    pub fn holds(&mut self, io: &mut dyn BlockIo, image: &Image, offset: u64, part: &GrainPart) -> DriverResult<()> {
        let length = usize::try_from(part.extent.length).map_err(|_| overflow("a part of a grain"))?;
        let (mut held, mut arriving) = (vec![0; length], vec![0; length]);
        let start = part.extent.guest_offset - part.grain;
        self.reader.read(io, image, (part.grain, offset), start, &mut held)?;
        part.extent.content.read(io, &mut arriving)?;
        if held == arriving {
            return Ok(());
        }
        let text = format!(
            "a streamOptimized vmdk can only get new grains, and the one of guest offset {} is in use: make one image of the \
             overlay and what is below it with `instar convert -O vmdk`",
            part.grain
        );
        Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, offset))
    }

    /// Whether anything is added to the file.
    pub fn appends(&self) -> bool {
        self.grains > 0 || self.copies > 0
    }

    /// See [`Sink::plan`](instar_guest_sdk::Sink::plan).
    pub fn plan(&mut self, io: &mut dyn BlockIo, image: &Image, extents: &[Extent]) -> DriverResult<()> {
        self.verify(io, image)?;
        let mut groups = Groups::of(extents);
        while let Some(group) = groups.next(image)? {
            self.plan_group(io, image, &group)?;
            // Zeroes over as much as a disk has may be many grains: there is no need to count all of them.
            self.check_length(image, self.final_length(image)?)?;
        }
        Ok(())
    }

    /// How long the file becomes at most, by what was planned until now.
    fn final_length(&self, image: &Image) -> DriverResult<u64> {
        let Self { grains, copies, tables, .. } = *self;
        if !self.appends() {
            let mended = self.stale_end(image).map_or(Some(0), |end| image.layout.file_length(end));
            return Ok(image
                .file_length
                .max(self.grown_end)
                .max(mended.ok_or_else(|| overflow("the length of the file"))?));
        }
        // Each new table may make the next grain begin at another multiple of its size.
        let layout = &image.layout;
        let new = [
            (grains, layout.new_grain_bytes()),
            (tables, layout.alignment()),
            (copies, layout.table_marker_bytes() + layout.table_bytes()),
        ];
        let add = |end: u64, (count, bytes): &(u64, u64)| end.checked_add(count.checked_mul(*bytes)?);
        let end = new.iter().try_fold(self.first_free, add).map(|end| end.max(image.file_length));
        end.and_then(|end| layout.file_length(end)).ok_or_else(|| overflow("the length of the file"))
    }

    /// Whether the file can become as long as that.
    fn check_length(&self, image: &Image, length: u64) -> DriverResult<()> {
        let longest = self.max_length.max(image.file_length).min(u64::from(u32::MAX) * SECTOR);
        if length > image.file_length && self.fixed {
            let text = if self.grown_end > 0 {
                "a larger disk has its tables behind the end of the file, and a block device has nothing there: copy the \
                 image into a file, or convert it to another format"
            } else {
                "new grains are added behind the end of the file, and a block device has nothing there: copy the \
                 image into a file, or convert it to another format"
            };
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 0));
        }
        if length > longest {
            let text = format!("the file would become {length} bytes long, and cannot be longer than {longest}");
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(image.device, 0));
        }
        Ok(())
    }

    /// See [`Sink::planned`](instar_guest_sdk::Sink::planned).
    pub fn planned(&mut self, io: &mut dyn BlockIo, image: &Image) -> DriverResult<PlanSummary> {
        self.verify(io, image)?;
        let (grains, copies) = (self.grains, self.copies);
        let final_length = self.final_length(image)?;
        self.check_length(image, final_length)?;
        let (table, grain) = (image.layout.table_bytes(), image.layout.grain_bytes());
        let new_metadata_clusters = copies.saturating_mul(table).div_ceil(grain.max(1));
        Ok(PlanSummary { final_length, new_data_clusters: grains, new_metadata_clusters, ..PlanSummary::default() })
    }
}
