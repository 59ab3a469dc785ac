//! Writing what arrives. New blocks go behind the last thing in the file.
//!
//! Some pieces at a time, in two steps with a flush between them:
//!
//! 1. data, in place or into new blocks, and the length of the file. A crash leaves nothing that any entry or bit names: what is
//!    in place is hidden by the overlay, and lost space is cut off by the next run;
//! 2. an entry of the log with the entries of the new blocks, of sector bitmap blocks, and the bits of the sectors that were
//!    added. All of it holds at once, or nothing.

use crate::group::{Group, Marked};
use crate::journal::updates;
use crate::lookup::Held;
use crate::pages::Pages;
use crate::sink::VhdxSink;
use alloc::collections::BTreeMap;
use instar_guest_sdk::abi::{ErrorCode, Request};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, ReadBelow};
use instar_vhdx_format::{Entry, State, ALIGNMENT, BITMAP_BLOCK};

/// All that is allocated is whole MiB, so that what comes next begins at one.
const _: () = assert!(BITMAP_BLOCK.is_multiple_of(ALIGNMENT));

impl VhdxSink {
    /// Take space in the file.
    fn allocate(&mut self, length: u64) -> DriverResult<u64> {
        let place = self.free;
        let end = place.checked_add(length).ok_or_else(|| overflow("the end of a block"))?;
        if end > self.max_length {
            let text = "the file may not become as long as it would have to";
            return Err(DriverError::new(ErrorCode::NoSpace, text).at(self.image.device, place));
        }
        if self.image.real_length > place {
            // The plan counted nothing new, so nobody has cut off what stands there.
            return Err(overflow("what the plan counted"));
        }
        self.free = end;
        Ok(place)
    }

    fn add_block(&mut self, group: &mut Group, block: u64, partial: bool) -> DriverResult<()> {
        let place = self.allocate(self.image.layout.block_size)?;
        group.add_block(&self.image, block, place, partial)
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
        let layout = self.image.layout;
        let piece = part.guest_offset / layout.piece_bytes();
        let (block, start) = (piece / layout.pieces_per_block(), piece * layout.piece_bytes());
        if !group.fresh.contains_key(&block) && !group.marked.contains_key(&piece) {
            let held = if group.zeroed.contains(&block) {
                Held::Zero
            } else {
                self.lookup.piece(io, &self.image, piece, limit)?.clone()
            };
            match held {
                Held::Nothing if part.is_zero() && !layout.has_parent => return Ok(()),
                Held::Nothing => self.add_block(group, block, layout.has_parent)?,
                Held::Zero if part.is_zero() => return self.keep_zero(io, group, block),
                Held::Zero => self.add_block(group, block, false)?,
                Held::All(data) => {
                    group.data.push(part.request(self.image.device, data + (part.guest_offset - start))?);
                    return Ok(());
                }
                Held::Some(data, bits) => {
                    let marked = Marked { data, bits: *bits, changed: false, blank: false };
                    group.mark(&self.image, piece, marked);
                }
            }
        }
        match group.fresh.get(&block) {
            // What is not written of it is zeroes already.
            Some(fresh) if !fresh.partial => {
                if !part.is_zero() {
                    let within = part.guest_offset - block * layout.block_size;
                    group.data.push(part.request(self.image.device, fresh.place + within)?);
                }
                Ok(())
            }
            _ => group.add(io, &self.image, (part, piece, start), below),
        }
    }

    /// Zeroes arrive where zeroes are read. Other programs may read something else where a block is only undefined (2.5.1.1).
    fn keep_zero(&mut self, io: &mut dyn BlockIo, group: &mut Group, block: u64) -> DriverResult<()> {
        if self.lookup.entry(io, &self.image, block, block + 1)?.state() != Some(State::Zero) {
            group.zero(&self.image, block);
        }
        Ok(())
    }

    /// Whether zeroes arrive over all of a block that only the parent has: then its entry says so, and it takes no room.
    fn becomes_zero(&mut self, io: &mut dyn BlockIo, group: &Group, part: &Extent) -> DriverResult<bool> {
        let layout = self.image.layout;
        let block = part.guest_offset / layout.block_size;
        let whole = part.is_zero() && layout.has_parent && part.length == layout.visible(block);
        if !whole || group.fresh.contains_key(&block) {
            return Ok(false);
        }
        Ok(self.lookup.entry(io, &self.image, block, block + 1)?.state() == Some(State::NotPresent))
    }

    /// The entries that the next entry of the log sets, and where new sector bitmap blocks are.
    fn entries(
        &mut self,
        io: &mut dyn BlockIo,
        group: &Group,
    ) -> DriverResult<(BTreeMap<u64, Entry>, BTreeMap<u64, u64>)> {
        let layout = self.image.layout;
        let (mut entries, mut bitmaps) = (BTreeMap::new(), BTreeMap::new());
        for &block in &group.zeroed {
            entries.insert(layout.payload_entry(block), Entry::ZERO);
        }
        for (&block, fresh) in &group.fresh {
            let partial = !fresh.is_whole(&self.image, block);
            entries.insert(layout.payload_entry(block), Entry::present(fresh.place, partial));
            let slot = layout.bitmap_entry(block);
            if partial && !bitmaps.contains_key(&slot) && self.lookup.bitmap(io, &self.image, block)?.is_none() {
                let place = self.allocate(BITMAP_BLOCK)?;
                entries.insert(slot, Entry::present(place, false));
                bitmaps.insert(slot, place);
            }
        }
        Ok((entries, bitmaps))
    }

    /// Both steps for what was collected.
    fn write_group(&mut self, io: &mut dyn BlockIo, group: &mut Group) -> DriverResult<()> {
        if group.says_nothing() {
            group.data.submit_to(io, &mut self.out)?;
            *group = Group::default();
            return Ok(());
        }
        let layout = self.image.layout;
        let (entries, bitmaps) = self.entries(io, group)?;
        if self.free > self.image.real_length {
            group.data.push(Request::set_length(self.image.device, self.free));
        }
        group.data.submit_to(io, &mut self.out)?;
        self.image.real_length = self.image.real_length.max(self.free);
        self.image.opened.file_length = self.image.real_length;
        let mut pages = Pages::default();
        for (entry, value) in entries {
            pages.put(io, &self.image, self.image.entry_place(entry), &value.0.to_le_bytes())?;
        }
        for (&piece, marked) in group.marked.iter().filter(|(_, marked)| marked.changed) {
            let block = piece / layout.pieces_per_block();
            if group.fresh.get(&block).is_some_and(|fresh| fresh.is_whole(&self.image, block)) {
                continue;
            }
            let bitmap = match bitmaps.get(&layout.bitmap_entry(block)) {
                Some(place) => Some(*place),
                None => self.lookup.bitmap(io, &self.image, block)?,
            };
            let bitmap = bitmap.ok_or_else(|| overflow("a sector bitmap"))?;
            pages.put(io, &self.image, bitmap + layout.bits_of_piece(piece).0, &marked.bits.0)?;
        }
        self.journal.commit(io, &mut self.image, &mut self.out, &updates([], pages.into_vec()))?;
        self.lookup.forget();
        *group = Group::default();
        Ok(())
    }

    /// See [`Sink::write`](instar_guest_sdk::Sink::write).
    pub(crate) fn write_extents(
        &mut self,
        io: &mut dyn BlockIo,
        extents: &[Extent],
        below: &mut dyn ReadBelow,
    ) -> DriverResult<()> {
        let layout = self.image.layout;
        let limit = extents.last().map_or(0, |extent| extent.end().min(layout.size).div_ceil(layout.piece_bytes()));
        let mut group = Group::default();
        for extent in extents {
            extent.end_within(layout.size)?;
            for part in extent.blocks(layout.block_size)? {
                if self.becomes_zero(io, &group, &part)? {
                    group.zero(&self.image, part.guest_offset / layout.block_size);
                } else if !self.is_nothing(io, &group, &part, limit)? {
                    for part in part.blocks(layout.piece_bytes())? {
                        self.prepare(io, &mut group, &part, limit, below)?;
                        if group.is_full() {
                            self.write_group(io, &mut group)?;
                        }
                    }
                }
                if group.is_full() {
                    self.write_group(io, &mut group)?;
                }
            }
        }
        self.write_group(io, &mut group)
    }

    /// Whether zeroes arrive where nothing is, and nothing below either.
    fn is_nothing(&mut self, io: &mut dyn BlockIo, group: &Group, part: &Extent, limit: u64) -> DriverResult<bool> {
        let layout = self.image.layout;
        let block = part.guest_offset / layout.block_size;
        if !part.is_zero() || layout.has_parent || group.fresh.contains_key(&block) {
            return Ok(false);
        }
        let entry = self.lookup.entry(io, &self.image, block, limit.div_ceil(layout.pieces_per_block()))?;
        Ok(entry.state() == Some(State::NotPresent))
    }
}
