//! Growth of a disk: its last extent becomes larger. What lies past the old end is prepared first; then one sector switches the
//! size:
//!
//! - of a disk in one file, the header, which names the text of the descriptor at the same stroke;
//! - of sparse extents in several files, the header of the last one. The descriptor says the new size before that: a
//!   reader of such a disk takes the lesser of the two, as QEMU does (`vmdk_parse_extents` takes the header's);
//! - of flat extents, the descriptor. The file of the last one is as long as that before.
//!
//! Each step is durable before the next one. A crash leaves the old size, or the new one; a second run finishes it.

use crate::content_id::DescriptorPlace;
use crate::disk::{Body, Flat, Part};
use crate::failures::at;
use crate::growth::Growth;
use crate::sink::{Shifted, VmdkSink};
use crate::sparse_sink::SparseSink;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, FileDevice};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, OrderedWriter, ReadBelow};
use instar_vmdk_format::{change_size, grow_header, Embedded, HeaderGrowth, NewSize, Step, HEADER_BYTES, SECTOR};

/// Bytes of an extent of a disk that is split: 2 GiB.
const SPLIT_BYTES: u64 = 2 << 30;
/// While that is planned, no header is known, and what it says stands for any.
const ANY_HEADER: [u8; HEADER_BYTES] = [0; HEADER_BYTES];
const NOTHING_SAID: HeaderGrowth = HeaderGrowth { capacity: 0, directory: 0, redundant_directory: None };

impl VmdkSink {
    fn refused(&self, text: impl Into<alloc::string::String>) -> DriverError {
        let device = Some(self.descriptor.device);
        DriverError { device, ..DriverError::new(ErrorCode::UnsupportedFormat, text) }
    }

    /// See [`Sink::grow`](instar_guest_sdk::Sink::grow).
    pub(crate) fn plan_growth(&mut self, io: &mut dyn BlockIo, size: u64, below_length: u64) -> DriverResult<()> {
        let old = self.info.virtual_size;
        let is_split = self.descriptor.text.create_type.starts_with(b"twoGbMaxExtent");
        let last = self.parts.last().ok_or_else(|| overflow("a disk without extents"))?;
        let (start, old_length) = (last.start, last.length);
        let length = size.checked_sub(start).ok_or_else(|| overflow("a disk that grows"))?;
        if is_split && length > SPLIT_BYTES {
            let most = start.saturating_add(SPLIT_BYTES.max(old_length));
            return Err(self.refused(format!(
                "its extents have 2 GiB at most, and another file would be needed for more than {most} bytes: convert it to a \
                 disk in one file, and resize that"
            )));
        }
        let new = NewSize { extent: length / SECTOR, old_disk: old / SECTOR, disk: size / SECTOR };
        // Before the directories are elsewhere.
        let home = self.one_file().map(|sparse| sparse.image.descriptor_home());
        let last = self.parts.last_mut().ok_or_else(|| overflow("a disk without extents"))?;
        match &mut last.body {
            Body::Sparse(sparse) => sparse.grow(io, length, below_length.saturating_sub(start))?,
            Body::Flat(flat) => flat.can_have(length)?,
            Body::SeSparse(_) => return Err(overflow("a disk that is only read")),
        }
        last.length = length;
        self.info.virtual_size = size;
        self.growth = Some(Growth { size: new, old_length, home });
        Ok(())
    }

    /// How much longer the file with the descriptor becomes by the new text, at most, where all else makes it `end` bytes long.
    /// Whatever can refuse that has done so.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] where a crash could tear the text; I/O errors.
    pub(crate) fn plan_text(&mut self, io: &mut dyn BlockIo, end: u64) -> DriverResult<u64> {
        let Some(growth) = self.growth else { return Ok(0) };
        let steps = self.steps(io, &growth, (&ANY_HEADER, &NOTHING_SAID), end)?;
        let longest = |step: &Step| {
            let written = step.writes.iter().map(|(at, bytes)| at.saturating_add(bytes.len() as u64)).max();
            written.unwrap_or(0).max(step.length.unwrap_or(0))
        };
        Ok(steps.iter().map(longest).max().unwrap_or(0).saturating_sub(end))
    }

    /// The steps that change the text, of a disk in one file with its header, whose other contents end at byte `end`.
    fn steps(
        &self,
        io: &mut dyn BlockIo,
        growth: &Growth,
        header: (&[u8; HEADER_BYTES], &HeaderGrowth),
        end: u64,
    ) -> DriverResult<Vec<Step>> {
        let DescriptorPlace { device, offset, length, longest, .. } = self.descriptor;
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| overflow("the descriptor"))?];
        io.read(device, offset, &mut bytes)?;
        let steps = match growth.home {
            Some(home) => {
                let embedded = Embedded { offset, home, file_length: Some(end) };
                grow_header(&bytes, &growth.size, header, embedded, longest)
            }
            None => change_size(&bytes, &growth.size, longest),
        };
        steps.map_err(at(ErrorCode::BackingCorrupt, device, offset))
    }

    /// Grow, if that was agreed to.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn make_grow(&mut self, io: &mut dyn BlockIo, below: &mut dyn ReadBelow) -> DriverResult<()> {
        let Some(growth) = self.growth.take() else { return Ok(()) };
        let (old, new, start) =
            (growth.old_length, growth.size.extent * SECTOR, self.parts.last().map_or(0, |part| part.start));
        let header = match self.parts.last_mut().map(|part| &mut part.body) {
            Some(Body::Sparse(sparse)) => sparse.prepare_growth(io, &mut Shifted { below, start })?,
            Some(Body::Flat(flat)) => flat.lengthen(io, old, new).map(|()| None)?,
            Some(Body::SeSparse(_)) | None => return Err(overflow("a disk that is only read")),
        };
        let said = header.unwrap_or(NOTHING_SAID);
        let (front, end) = match self.one_file() {
            Some(sparse) => (sparse.header(io)?, sparse.image.file_length),
            None => (ANY_HEADER, self.descriptor.length),
        };
        let steps = self.steps(io, &growth, (&front, &said), end)?;
        self.descriptor.take(io, &steps)?;
        if let (Some(Body::Sparse(sparse)), None) = (self.parts.last_mut().map(|part| &mut part.body), growth.home) {
            sparse.switch(io, &said)?;
        }
        let length = steps.iter().filter_map(|step| step.length).next_back();
        self.reread(io, growth.home, length)
    }

    /// The extent that a disk in one file consists of.
    fn one_file(&self) -> Option<&SparseSink> {
        match self.parts.as_slice() {
            [Part { body: Body::Sparse(sparse), .. }] if sparse.image.device == self.descriptor.device => Some(sparse),
            _ => None,
        }
    }

    /// The text may have moved, and its content ID within it. A descriptor that is a file has this `length` in bytes now, if
    /// it has another one.
    fn reread(&mut self, io: &mut dyn BlockIo, home: Option<(u64, u64)>, length: Option<u64>) -> DriverResult<()> {
        let DescriptorPlace { device, longest, .. } = self.descriptor;
        let place = home.unwrap_or((0, length.unwrap_or(self.descriptor.length)));
        if let (Some(home), Some(Body::Sparse(sparse))) = (home, self.parts.first_mut().map(|part| &mut part.body)) {
            let layout = &mut sparse.image.layout;
            (layout.descriptor_offset, layout.descriptor_size) = (home.0 / SECTOR, home.1 / SECTOR);
        }
        let file = FileDevice { device, max_length: longest, ..FileDevice::default() };
        self.descriptor = DescriptorPlace::read(io, &file, place, ErrorCode::BackingCorrupt)?;
        Ok(())
    }
}

impl Flat {
    /// Whether the file can hold this extent with `length` bytes.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] if not.
    fn can_have(&self, length: u64) -> DriverResult<()> {
        let end = self.offset.checked_add(length).ok_or_else(|| overflow("a flat extent"))?;
        let text = if self.is_device && end > self.file_length {
            "its last extent is on a block device that is not as long as that: make the device larger first"
        } else if end > self.longest.max(self.file_length) {
            "the file of its last extent cannot become as long as that"
        } else {
            return Ok(());
        };
        Err(DriverError { device: Some(self.device), ..DriverError::new(ErrorCode::UnsupportedFormat, text) })
    }

    /// Have the file hold `new` bytes of this extent, of which those from `old` on are zero, durably. They are not on the
    /// disk yet.
    fn lengthen(&mut self, io: &mut dyn BlockIo, old: u64, new: u64) -> DriverResult<()> {
        let mut out = OrderedWriter::new(self.device);
        let (from, end) = (self.offset.saturating_add(old), self.offset.saturating_add(new));
        // What somebody has left there.
        let stale = self.file_length.min(end).saturating_sub(from);
        if stale > 0 {
            out.zero(io, from, stale)?;
        }
        if end > self.file_length {
            out.set_length(io, end)?;
            self.file_length = end;
        }
        out.barrier(io)
    }
}
