//! The sink role of a disk: data goes into the extents that it falls into.
//!
//! A disk that grows does so first: what it holds stays the same, and so does its content ID. Before the first data the disk
//! gets its new content ID, durably: the overlay has recorded it already. After that each
//! extent keeps its own order: no file holds anything that points into another one.

use crate::content_id::DescriptorPlace;
use crate::disk::{Body, Disk, Flat, Part};
use crate::growth::Growth;
use crate::sesparse::SeSparse;
use crate::sparse_sink::SparseSink;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, ImageId, ImageInfo, PlanSummary, Request};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, OrderedWriter, ReadBelow, Sink};
use instar_vmdk_format::next_content_id;

/// Bytes of the heap that writing takes at most: tables in both copies and as bytes, what is filled up from below.
const WRITING_ROOM: usize = 14 << 20;

/// A vmdk that data goes into.
#[derive(Debug)]
pub struct VmdkSink {
    pub(crate) info: ImageInfo,
    pub(crate) descriptor: DescriptorPlace,
    /// Bytes of the file that holds the descriptor and nothing else, which keeps its length; 0 if there is none.
    descriptor_file: u64,
    pub(crate) parts: Vec<Part<SparseSink>>,
    /// The content ID that the image gets.
    next_id: u32,
    /// It is written, or the disk keeps the one that it has.
    identified: bool,
    /// The devices of flat extents that were written to.
    flats: BTreeMap<u32, OrderedWriter>,
    /// How it will grow, if it does.
    pub(crate) growth: Option<Growth>,
}

/// What shows from below an extent that begins at guest byte `start`, by its own offsets.
pub struct Shifted<'a> {
    pub below: &'a mut dyn ReadBelow,
    pub start: u64,
}

impl ReadBelow for Shifted<'_> {
    fn exists(&self) -> bool {
        self.below.exists()
    }

    fn length(&self) -> u64 {
        self.below.length().saturating_sub(self.start)
    }

    fn read(&mut self, io: &mut dyn BlockIo, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let at = guest_offset.checked_add(self.start).ok_or_else(|| overflow("a guest offset"))?;
        self.below.read(io, at, buffer)
    }
}

impl VmdkSink {
    pub(crate) fn new(disk: Disk, device: &DeviceConfig, has_backing: bool) -> DriverResult<Self> {
        let info = ImageInfo { virtual_size: disk.size, cluster_size: disk.cluster_size };
        for part in &disk.parts {
            if let Body::SeSparse(SeSparse { device, .. }) = part.body {
                let text =
                    "a seSparse extent cannot be written to: VMware documents neither its journal nor its back map";
                return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(device, 0));
            }
        }
        let (descriptor, parts) = disk.map(|image, file| SparseSink::new(image, &file, has_backing))?;
        let id = &descriptor.text.content_id;
        let next_id = next_content_id(id.value, None);
        let identified = device.flags & device_flags::KEEPS_IDENTITY != 0;
        if !identified {
            // Any other one has as many digits.
            descriptor.can_replace(id, next_id)?;
        }
        let descriptor_file = if device.files.count() == 0 { 0 } else { device.file_length };
        let (flats, growth) = (BTreeMap::new(), None);
        Ok(Self { info, descriptor, descriptor_file, parts, next_id, identified, flats, growth })
    }

    /// Extents cut at the borders of the parts, with the index of the part that each run of them falls into, by the part's
    /// own offsets.
    ///
    /// # Errors
    /// [`ErrorCode::BackingTooSmall`] for an extent past the end of the disk.
    fn by_part(&self, extents: &[Extent]) -> DriverResult<Vec<(usize, Vec<Extent>)>> {
        let mut runs: Vec<(usize, Vec<Extent>)> = Vec::new();
        for extent in extents {
            let size = self.info.virtual_size;
            let end = extent.end_within(size).map_err(|error| error.at(self.descriptor.device, 12))?;
            let first = self.parts.partition_point(|part| part.end() <= extent.guest_offset);
            for (index, part) in self.parts.iter().enumerate().skip(first).take_while(|(_, part)| part.start < end) {
                let Some(piece) = extent.clip(part.start..part.end()) else { continue };
                let local = Extent { guest_offset: piece.guest_offset - part.start, ..piece };
                match runs.last_mut() {
                    Some((last, run)) if *last == index => run.push(local),
                    _ => runs.push((index, alloc::vec![local])),
                }
            }
        }
        Ok(runs)
    }

    fn take_content_id(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if !self.identified {
            let id = &self.descriptor.text.content_id;
            self.descriptor.text.content_id = self.descriptor.replace(io, id, self.next_id, false)?;
            self.identified = true;
        }
        Ok(())
    }

    /// In place: the overlay hides what is written.
    fn write_flat(&mut self, io: &mut dyn BlockIo, flat: Flat, extents: &[Extent]) -> DriverResult<()> {
        let request = |extent: &Extent| extent.request(flat.device, flat.offset + extent.guest_offset);
        let mut requests = extents.iter().map(request).collect::<DriverResult<Vec<Request>>>()?;
        self.flats.entry(flat.device).or_insert(OrderedWriter::new(flat.device)).run(io, &mut requests)
    }
}

impl Sink for VmdkSink {
    fn info(&self) -> ImageInfo {
        self.info
    }

    fn grow(&mut self, io: &mut dyn BlockIo, virtual_size: u64, below_length: u64) -> DriverResult<()> {
        self.plan_growth(io, virtual_size, below_length)
    }

    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        let compresses =
            |part: &Part<SparseSink>| matches!(&part.body, Body::Sparse(sparse) if sparse.image.layout.compressed);
        if extents.iter().any(Extent::is_encoded) && self.parts.iter().any(compresses) {
            // Whether a grain holds it already.
            let text = "what is compressed in the overlay has to be decoded for the plan";
            return Err(DriverError::new(ErrorCode::NotImplemented, text).at(self.descriptor.device, 0));
        }
        for (index, run) in self.by_part(extents)? {
            if let Some(Part { body: Body::Sparse(sparse), .. }) = self.parts.get_mut(index) {
                sparse.plan(io, &run)?;
            }
        }
        Ok(())
    }

    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        let free = io.heap_free();
        if free < WRITING_ROOM {
            let text = format!("writing takes {WRITING_ROOM} bytes, and of the memory of the sandbox {free} are free");
            return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(self.descriptor.device, 0));
        }
        let mut all = PlanSummary { final_length: self.descriptor_file, ..PlanSummary::default() };
        for part in &mut self.parts {
            let plan = match &mut part.body {
                Body::Sparse(sparse) => sparse.planned(io)?,
                Body::Flat(Flat { offset, file_length, .. }) => {
                    let final_length = offset.saturating_add(part.length).max(*file_length);
                    PlanSummary { final_length, ..PlanSummary::default() }
                }
                Body::SeSparse(_) => PlanSummary { final_length: part.length, ..PlanSummary::default() },
            };
            all.final_length = all.final_length.saturating_add(plan.final_length);
            all.new_data_clusters = all.new_data_clusters.saturating_add(plan.new_data_clusters);
            all.new_metadata_clusters = all.new_metadata_clusters.saturating_add(plan.new_metadata_clusters);
        }
        let end = if self.descriptor_file == 0 { all.final_length } else { self.descriptor_file };
        let text = self.plan_text(io, end)?;
        all.final_length = all.final_length.saturating_add(text);
        Ok(all)
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        self.make_grow(io, below)?;
        if extents.is_empty() {
            return Ok(());
        }
        self.take_content_id(io)?;
        for (index, run) in self.by_part(extents)? {
            match self.parts.get_mut(index) {
                Some(Part { body: Body::Sparse(sparse), start, .. }) => {
                    let mut below = Shifted { below: &mut *below, start: *start };
                    sparse.write(io, &run, &mut below)?;
                }
                Some(Part { body: Body::Flat(flat), .. }) => {
                    let flat = *flat;
                    self.write_flat(io, flat, &run)?;
                }
                Some(Part { body: Body::SeSparse(_), .. }) | None => return Err(overflow("a part of the disk")),
            }
        }
        Ok(())
    }

    fn next_identity(&mut self, child: Option<&ImageId>) -> Option<ImageId> {
        let child = child.and_then(|child| child.as_bytes().try_into().ok()).map(u32::from_be_bytes);
        self.next_id = next_content_id(self.descriptor.text.content_id.value, child);
        ImageId::new(&self.next_id.to_be_bytes())
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        for part in &mut self.parts {
            if let Body::Sparse(sparse) = &mut part.body {
                sparse.finish(io)?;
            }
        }
        self.flats.values_mut().try_for_each(|out| out.barrier(io))
    }
}
