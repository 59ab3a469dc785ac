//! Writing into a disk with blocks. New blocks go behind the last one, over the footer at the end; the copy in front carries the
//! image until there is another one.
//!
//! Some pieces at a time, in two steps with a flush between them:
//!
//! 1. data, in place or into new blocks; the bitmaps of new blocks, and a new footer behind them. A crash leaves nothing that any
//!    entry or bitmap names: what is in place is hidden by the overlay, and lost space is cut off by the next run;
//! 2. the entries of the new blocks, and the bits of the sectors that were added to others. Each is within one sector, so that a
//!    crash leaves it as it was or as it will be, and either is true.

use crate::group::{Group, Marked, Target};
use crate::growth::Growth;
use crate::image::Image;
use crate::lookup::{Held, Lookup};
use crate::table::Table;
use crate::verify::Survey;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, PlanSummary, Request};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, OrderedWriter, ReadBelow};
use instar_vhd_format::{DATA_ALIGNMENT, FOOTER_BYTES, SECTOR, UNUSED};

/// Bytes of the heap that writing takes at most: what a group collects, tables, a table that is moved.
const WRITING_ROOM: usize = 6 << 20;
/// No entry can name a block behind this byte.
const LONGEST: u64 = u32::MAX as u64 * SECTOR;
/// Entries of the table that are gone through at once.
const ENTRIES: u64 = 1 << 14;

/// A disk with blocks that data goes into.
#[derive(Debug)]
pub struct SparseSink {
    pub image: Image,
    max_length: u64,
    pub out: OrderedWriter,
    pub lookup: Lookup,
    survey: Option<Survey>,
    /// Where the next block may begin, at a sector.
    pub free: u64,
    pub growth: Option<Growth>,
    /// New blocks that were counted, and the last one that was looked at.
    planned: (u64, Option<u64>),
    started: bool,
    /// What was behind `free` in the file when it was opened is gone.
    cut: bool,
}

impl SparseSink {
    pub(crate) fn new(image: Image, device: &DeviceConfig) -> Self {
        let (out, max_length) = (OrderedWriter::new(image.device), device.max_length);
        let (lookup, survey, growth, planned) = Default::default();
        Self { image, max_length, out, lookup, survey, free: 0, growth, planned, started: false, cut: false }
    }

    /// Bytes of the disk, once it has grown.
    pub fn size(&self) -> u64 {
        self.growth.as_ref().map_or(self.image.size, |growth| growth.size)
    }

    pub fn refused(&self, text: impl Into<String>) -> DriverError {
        DriverError::new(ErrorCode::UnsupportedFormat, text.into()).at(self.image.device, self.image.data_end())
    }

    /// Verify all metadata, once: what is not refused here is written over.
    pub fn verify(&mut self, io: &mut dyn BlockIo) -> DriverResult<Survey> {
        if let Some(survey) = self.survey {
            return Ok(survey);
        }
        let survey = self.image.verify(io)?;
        self.free = survey.end;
        self.survey = Some(survey);
        Ok(survey)
    }

    /// See [`Sink::plan`](instar_guest_sdk::Sink::plan).
    pub fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.verify(io)?;
        let (size, block_size) = (self.size(), self.image.header.block_size());
        let limit = extents.last().map_or(0, |extent| extent.end().div_ceil(block_size)).min(self.image.blocks());
        for extent in extents {
            let end = extent.end_within(size).map_err(|error| error.at(self.image.device, self.image.data_end()))?;
            if extent.is_zero() && !self.image.has_parent() {
                // Where no block is, there are zeroes already.
                continue;
            }
            for block in extent.guest_offset / block_size..end.div_ceil(block_size) {
                // One that two extents have a part in is counted once.
                if self.planned.1 == Some(block) {
                    continue;
                }
                self.planned.1 = Some(block);
                let there = block < self.image.blocks() && self.lookup.entry(io, &self.image, block, limit)? != UNUSED;
                self.planned.0 += u64::from(!there);
            }
        }
        Ok(())
    }

    /// See [`Sink::planned`](instar_guest_sdk::Sink::planned).
    pub fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        self.verify(io)?;
        let heap = io.heap_free();
        if heap < WRITING_ROOM {
            let text = format!("writing takes {WRITING_ROOM} bytes, and of the memory of the sandbox {heap} are free");
            return Err(DriverError::new(ErrorCode::ScratchTooSmall, text).at(self.image.device, 0));
        }
        let (image, new) = (&self.image, self.planned.0);
        let moved = self.growth.as_ref().map_or(0, |growth| growth.new_bytes(image));
        // Each new block may begin at a page.
        let each = image.header.stride().checked_add(DATA_ALIGNMENT);
        let blocks = each.and_then(|each| each.checked_mul(new)).and_then(|bytes| bytes.checked_add(moved));
        let end = blocks.and_then(|bytes| self.free.checked_add(bytes)).ok_or_else(|| overflow("the file's length"))?;
        let allocates = new > 0 || moved > 0;
        let final_length = match (allocates, image.fixed_length) {
            // The footer stays where it is, and what is behind is not there.
            (true, true) if end > image.data_end() => end.saturating_add(FOOTER_BYTES as u64),
            (_, true) => image.file_length,
            // A footer that is missing is written, too.
            (false, false) if image.footers.tail.is_some() => image.file_length,
            (_, false) => end.saturating_add(FOOTER_BYTES as u64).max(image.file_length),
        };
        if final_length > self.max_length.max(image.file_length).min(LONGEST.max(image.file_length)) {
            let most = self.max_length.min(LONGEST);
            let text = format!("the file would become {final_length} bytes long, and cannot be longer than {most}");
            return Err(self.refused(text));
        }
        let new_metadata_clusters = moved.div_ceil(image.header.block_size());
        Ok(PlanSummary { final_length, new_data_clusters: new, new_metadata_clusters, ..PlanSummary::default() })
    }

    /// What comes before the first write: a lost copy of the footer is written again, since the other one is about to
    /// be overwritten; the disk grows; and the batmap says nothing of blocks that are not there, and may be soon.
    fn start(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if core::mem::replace(&mut self.started, true) {
            return Ok(());
        }
        if !self.image.footers.head {
            self.out.write(io, 0, &self.image.footers.footer.encode())?;
            self.out.barrier(io)?;
            self.image.footers.head = true;
        }
        self.make_grow(io)?;
        self.tidy_batmap(io)
    }

    fn tidy_batmap(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let Some(mut batmap) = self.image.batmap.take() else { return Ok(()) };
        let mut absent: Vec<u64> = Vec::new();
        let read = Table::each(io, &self.image, ENTRIES, &mut |_, table| {
            let dangling = table.iter().filter(|(block, entry)| *entry == UNUSED && batmap.is_full(*block));
            absent.extend(dangling.map(|(block, _)| block));
            Ok(())
        });
        let changed = batmap.keep(|block| absent.binary_search(&block).is_err()) || !batmap.valid;
        let written = match read {
            Ok(()) if changed => batmap.write(io, &mut self.out),
            read => read,
        };
        self.image.batmap = Some(batmap);
        // Durable with the data of the first block, before its entry is.
        written
    }

    /// Have the file end at the first byte that nobody uses, in a batch of requests that comes before what is written there:
    /// what a crash or another program left behind it would show in new blocks.
    pub fn cut(&mut self) -> Option<Request> {
        let first = !core::mem::replace(&mut self.cut, true);
        let longer = first && !self.image.fixed_length && self.image.file_length > self.free;
        longer.then(|| Request::set_length(self.image.device, self.free))
    }

    /// Take space for a new block.
    fn allocate(&mut self, group: &mut Group, block: u64) -> DriverResult<()> {
        self.cut().into_iter().for_each(|request| group.data.push(request));
        let place = self.image.place_behind(self.free).ok_or_else(|| overflow("the place of a block"))?;
        let end = place.checked_add(self.image.header.stride()).ok_or_else(|| overflow("the end of a block"))?;
        let room = if self.image.fixed_length { self.image.data_end() } else { self.max_length.min(LONGEST) };
        if end > room {
            let text = "the file may not become as long as it would have to";
            return Err(DriverError::new(ErrorCode::NoSpace, text).at(self.image.device, place));
        }
        if self.image.fixed_length {
            // What is new of a file is zero.
            group.data.push(Request::zero(self.image.device, place, end - place));
        }
        self.free = end;
        group.add_block(&self.image, block, place)
    }

    /// Collect a part of an extent within one piece.
    fn prepare(
        &mut self,
        io: &mut dyn BlockIo,
        group: &mut Group,
        part: &Extent,
        limit: u64,
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let (bytes, per_block) = (self.image.piece_bytes(), self.image.pieces_per_block());
        let piece = part.guest_offset / bytes;
        let (block, within, start) = (piece / per_block, piece % per_block, piece * bytes);
        if !group.fresh.contains_key(&block) && !group.marked.contains_key(&piece) {
            match self.lookup.piece(io, &self.image, piece, limit)? {
                Held::Nothing if part.is_zero() && !self.image.has_parent() => return Ok(()),
                Held::Nothing => self.allocate(group, block)?,
                Held::All(data) => {
                    let request = part.request(self.image.device, data + (part.guest_offset - start))?;
                    group.data.push(request);
                    return Ok(());
                }
                Held::Some(data, bitmap) => {
                    // Bitmap and data are within a block that was looked at.
                    let place = (data - within * bytes - self.image.header.bitmap_bytes()) + within * SECTOR;
                    group.mark(piece, Marked { place, data: *data, bitmap: **bitmap, changed: false });
                }
            }
        }
        let index = usize::try_from(within).map_err(|_| overflow("a piece"))?;
        let found = match (group.fresh.get(&block), group.marked.get(&piece)) {
            (Some(fresh), _) => {
                let data = fresh.place + self.image.header.bitmap_bytes() + within * bytes;
                fresh.bitmaps.get(index).map(|bitmap| (data, true, *bitmap))
            }
            (None, Some(marked)) => Some((marked.data, false, marked.bitmap)),
            (None, None) => None,
        };
        let (data, blank, mut bitmap) = found.ok_or_else(|| overflow("a piece"))?;
        let changed = group.add(io, &self.image, (part, Target { start, data, blank }), &mut bitmap, below)?;
        if let Some(place) = group.fresh.get_mut(&block).and_then(|fresh| fresh.bitmaps.get_mut(index)) {
            *place = bitmap;
        } else if let Some(marked) = group.marked.get_mut(&piece) {
            (marked.bitmap, marked.changed) = (bitmap, marked.changed || changed);
        }
        Ok(())
    }

    /// Both steps for what was collected.
    fn write_group(&mut self, io: &mut dyn BlockIo, group: &mut Group) -> DriverResult<()> {
        if group.says_nothing() {
            group.data.submit_to(io, &mut self.out)?;
            *group = Group::default();
            return Ok(());
        }
        let allocated = !group.fresh.is_empty();
        group.push_bitmaps(self.image.device);
        let footer = self.image.footers.footer.encode();
        if allocated && !self.image.fixed_length {
            let (address, length) = (footer.as_ptr() as u64, footer.len() as u64);
            group.data.push(Request::write(self.image.device, self.free, address, length));
        }
        group.data.submit_to(io, &mut self.out)?;
        if allocated && !self.image.fixed_length {
            self.image.footers.tail = Some((self.free, true));
            self.image.file_length = self.free + FOOTER_BYTES as u64;
        }
        self.out.barrier(io)?;
        group.publish(io, &self.image, &mut self.out)?;
        self.lookup.forget();
        Ok(())
    }

    /// See [`Sink::write`](instar_guest_sdk::Sink::write).
    pub fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        self.start(io)?;
        let bytes = self.image.piece_bytes();
        let limit = extents.last().map_or(0, |extent| extent.end().div_ceil(bytes));
        let mut group = Group::default();
        for extent in extents {
            extent.end_within(self.image.size)?;
            for part in extent.blocks(bytes)? {
                self.prepare(io, &mut group, &part, limit, below)?;
                if group.is_full() {
                    self.write_group(io, &mut group)?;
                }
            }
        }
        self.write_group(io, &mut group)
    }

    /// See [`Sink::finish`](instar_guest_sdk::Sink::finish). A footer at the end that is missing, or says another size, is written
    /// again: an earlier run was interrupted.
    pub fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if !self.image.footers.are_whole() {
            self.start(io)?;
            let place = match self.image.footers.tail {
                Some((offset, _)) => offset,
                None if self.image.fixed_length => {
                    (self.image.file_length / SECTOR * SECTOR).saturating_sub(FOOTER_BYTES as u64)
                }
                None => self.free,
            };
            let mut requests: Vec<Request> = self.cut().filter(|_| place == self.free).into_iter().collect();
            let footer = self.image.footers.footer.encode();
            requests.push(Request::write(self.image.device, place, footer.as_ptr() as u64, footer.len() as u64));
            self.out.run(io, &mut requests)?;
            self.image.footers.tail = Some((place, true));
        }
        self.out.barrier(io)
    }
}
