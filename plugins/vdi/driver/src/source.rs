//! The source role: what an image holds, the record of its parent, and emptying it.

use crate::image::Image;
use crate::map::{each_chunk, offset_of, Map};
use crate::mend;
use crate::parent::{record, with_parent};
use crate::survey::{survey, verified};
use alloc::format;
use core::ops::Range;
use instar_guest_sdk::abi::{
    CheckSummary, DeviceConfig, ErrorCode, FindingKind, ImageId, ImageInfo, ParentStage, Repair, RepairSummary, Request,
};
use instar_guest_sdk::table::tell_findings;
use instar_guest_sdk::{
    overflow, BlockIo, Content, DriverError, DriverResult, Extent, Extents, OrderedWriter, Parent, Source,
};
use instar_vdi_format::{Entry, ImageType, Uuid, HEADER_BYTES, UUID_BYTES};

/// A VDI that data comes from.
#[derive(Debug)]
pub struct VdiSource {
    image: Image,
    map: Map,
    held: u64,
    /// The header with another parent, once that was planned.
    parent: Option<[u8; HEADER_BYTES]>,
    /// What `cBlocksAllocated` is to be, once a repair was planned.
    slots: Option<u32>,
}

impl VdiSource {
    pub(crate) fn new(image: Image, device: &DeviceConfig) -> Self {
        let map = Map::new(&image, device.cache_bytes);
        Self { image, map, held: 0, parent: None, slots: None }
    }

    /// The extent of a block that the image holds.
    fn extent(&self, block: u32, entry: Entry) -> DriverResult<Option<Extent>> {
        let range = self.image.disk().range(block.into());
        let content = match entry {
            Entry::Free => return Ok(None),
            Entry::Zero => Content::Zero,
            Entry::Slot(slot) if !self.image.holds_slot(slot) => {
                let text = format!("block {block} of the disk is in slot {slot}, past the end of the file");
                return Err(self.image.corrupt(offset_of(&self.image, block.into()), text));
            }
            Entry::Slot(slot) => {
                Content::Data { device: self.image.device, offset: self.image.header.slot_offset(slot) }
            }
        };
        Ok(Some(Extent { guest_offset: range.start, length: range.end - range.start, content }))
    }

    /// Make every entry free, where it is not, and that durable.
    fn free_all(&self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        let free = Entry::Free.encode();
        each_chunk(io, &self.image, 0..self.image.header.blocks, &mut |io, first, entries| {
            let held = |entry: &u32| *entry != free;
            let Some((start, end)) = entries.iter().position(held).zip(entries.iter().rposition(held)) else {
                return Ok(());
            };
            let bytes = alloc::vec![0xff; (end - start + 1).saturating_mul(4)];
            out.write(io, offset_of(&self.image, u64::from(first) + start as u64), &bytes)
        })?;
        out.barrier(io)
    }
}

impl Source for VdiSource {
    fn info(&self) -> ImageInfo {
        self.image.info()
    }

    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        if will_empty && self.image.header.image_type == ImageType::Static {
            let text = "a static image holds all of its disk, and cannot be emptied";
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(self.image.device, 0));
        }
        self.held = verified(io, &self.image)?.held;
        Ok(self.held)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let size = self.image.header.block_size;
        let narrow = |block: u64| u32::try_from(block).unwrap_or(u32::MAX).min(self.image.disk_blocks());
        let (mut block, end) = (narrow(range.start / size), narrow(range.end.div_ceil(size)));
        let mut before = None;
        while block < end {
            let entry = self.map.get(io, &self.image, block, end)?;
            if entry.slot().is_some() && entry.slot() == before {
                let text = format!("block {block} of the disk lies in the same place as the one before it");
                return Err(self.image.corrupt(offset_of(&self.image, block.into()), text));
            }
            before = entry.slot();
            if self.extent(block, entry)?.is_some_and(|extent| !out.push(extent)) {
                return Ok(self.image.disk().range(block.into()).start);
            }
            block += 1;
        }
        Ok((u64::from(block) * size).min(self.image.header.virtual_size()))
    }

    fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
        Err(overflow("an encoded extent"))
    }

    /// First the map: from then on everything is read from the backing. A crash before or within that leaves some blocks,
    /// which read the same. Then, with that durable, `cBlocksAllocated`, and with that durable the space is given back. The
    /// other way round, entries would name what is not there, or what is given out again.
    ///
    /// What an interrupted commit left to do is done, too. `uuidModify` stays: the content is what it was, as it is seen
    /// through the chain, and an image above this one recorded it.
    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.map.forget();
        let mut out = OrderedWriter::new(self.image.device);
        self.free_all(io, &mut out)?;
        if self.image.header.allocated != 0 {
            self.image.header.allocated = 0;
            self.image.write_header(io, &mut out)?;
            out.barrier(io)?;
        }
        let end = self.image.header.data_offset;
        if self.image.file_length > end {
            let (device, tail) = (self.image.device, self.image.file_length - end);
            // A block device keeps its length: there the space is given back by that.
            let mut requests = [Request::discard(device, end, tail), Request::set_length(device, end)];
            out.run(io, &mut requests)?;
            out.barrier(io)?;
            self.image.file_length = end;
        }
        Ok(core::mem::take(&mut self.held))
    }

    fn identity(&self) -> Option<ImageId> {
        ImageId::new(&self.image.header.identity())
    }

    /// One write within the first sector, durable when it returns. Two fields say it: the state that the parent gets, and,
    /// until it has it and all of the data, a mark in a field that nobody uses. Without the mark a commit that was
    /// interrupted could not be told from a parent that was restored from a backup after one that was not.
    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        let header = &mut self.image.header;
        if !header.has_parent() {
            return Ok(());
        }
        let parts = identity.as_bytes().split_at_checked(UUID_BYTES);
        let modify = parts.filter(|(create, _)| *create == header.link.0.as_slice());
        let modify = modify.and_then(|(_, modify)| Some(Uuid(modify.try_into().ok()?)));
        let modify = modify.ok_or_else(|| overflow("the identity of the parent"))?;
        let announced = stage == ParentStage::Announced;
        if (header.parent_modify, header.parent_announced()) == (modify, announced) {
            return Ok(());
        }
        let range = header.record_parent(modify, announced);
        let bytes = header.bytes.get(range.clone()).unwrap_or_default();
        io.write(self.image.device, range.start as u64, bytes)?;
        io.flush(self.image.device)
    }

    fn check(
        &mut self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        let image = &self.image;
        let rest = "the map is damaged throughout: the rest of it was not looked at";
        let (found, mut corruptions) = tell_findings(finding, rest, |wrong| survey(io, image, wrong))?;
        let Some(found) = found else {
            return Ok(CheckSummary { corruptions, ..CheckSummary::default() });
        };
        let (allocated, blocks) = (u64::from(image.header.allocated), u64::from(image.header.blocks));
        if allocated < found.top {
            corruptions += 1;
            let text = format!(
                "cBlocksAllocated is {allocated}, and slot {} is used: another program would write the next block over \
                 one that is there",
                found.top - 1
            );
            finding(FindingKind::Corruption, &text);
        }
        if allocated > blocks {
            corruptions += 1;
            let text =
                format!("cBlocksAllocated is {allocated}, more than the {blocks} blocks: VirtualBox refuses that");
            finding(FindingKind::Corruption, &text);
        }
        // Slots that two blocks share are counted twice.
        let leaks = allocated.max(found.top).saturating_sub(found.used);
        if leaks > 0 {
            let text = format!("{leaks} of {} slots are used by no block", allocated.max(found.top));
            finding(FindingKind::Leak, &text);
        }
        if found.beyond > 0 {
            let text = format!("{} entries of the map are for blocks past the end of the disk", found.beyond);
            finding(FindingKind::Leak, &text);
        }
        let end = image.data_end(allocated.max(found.top)).unwrap_or(u64::MAX);
        let unused = image.file_length.saturating_sub(end);
        Ok(CheckSummary {
            image_end_offset: end.min(image.file_length),
            total_clusters: image.disk_blocks().into(),
            allocated_clusters: found.used,
            fragmented_clusters: found.fragmented,
            compressed_clusters: 0,
            corruptions,
            leaks: leaks + found.beyond,
            unused_tail: unused - unused % image.header.stride(),
        })
    }
    fn plan_parent(&mut self, _: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<()> {
        self.parent = None;
        self.parent = Some(with_parent(&self.image, parent)?);
        Ok(())
    }

    fn set_parent(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let header = self.parent.take().ok_or_else(|| overflow("a parent that was not planned"))?;
        record(io, &mut self.image, &header)
    }

    fn plan_repair(
        &mut self,
        io: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<RepairSummary> {
        let (slots, summary) = mend::plan(io, &self.image, repair, finding)?;
        self.slots = slots;
        Ok(summary)
    }

    fn repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        match self.slots.take() {
            Some(slots) => mend::apply(io, &mut self.image, slots),
            None => Ok(()),
        }
    }
}
