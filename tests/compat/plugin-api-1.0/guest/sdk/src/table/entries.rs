//! The entries of a table: read a window at a time, changed in memory, and written when what they name is durable.

use super::changes::Changes;
use super::kind::EntryKind;
use super::window::Window;
use super::SECTOR;
use crate::batch::Batch;
use crate::error::{overflow, DriverResult};
use crate::holes::Holes;
use crate::io::BlockIo;
use crate::ordered::OrderedWriter;
use core::fmt;
use core::marker::PhantomData;
use core::ops::Range;
use instar_guest_abi::Request;

/// Requests that are collected before they are submitted.
const BATCH: usize = 4096;

/// Callback for an entry: gets its index and its number.
pub type EachEntry<'a, N> = &'a mut dyn FnMut(&mut dyn BlockIo, u64, N) -> DriverResult<()>;

/// Entries of a table, or of several of one kind, on a device.
///
/// The offset in the file at which an entry begins, a multiple of its width, identifies it. Tables must not share a sector of
/// 512 bytes: the bytes between two changed entries of a table are written with them, as they were read. No byte is written in
/// front of the first changed entry of a table, or behind the last one.
///
/// Reading holds 64 KiB at most, and changed entries 4 MiB.
#[derive(Clone)]
pub struct Table<K> {
    window: Window,
    changes: Changes,
    kind: PhantomData<K>,
}

impl<K> fmt::Debug for Table<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("window", &self.window).field("changes", &self.changes).finish()
    }
}

impl<K: EntryKind> Table<K> {
    /// Make a table on `device` in which an entry of 0 is empty, so that its parts in holes of the file are never read, however
    /// long they are. `cache_bytes` bounds the memory for reading, as in [`DeviceConfig`](instar_guest_abi::DeviceConfig); 0
    /// for no bound.
    #[must_use]
    pub fn sparse(device: u32, cache_bytes: u64) -> Self {
        Self::new(Window::new(device, cache_bytes, Some(Holes::default())))
    }

    /// A table on `device` in which 0 is an entry like any other: there is no use in asking for holes.
    #[must_use]
    pub fn dense(device: u32, cache_bytes: u64) -> Self {
        Self::new(Window::new(device, cache_bytes, None))
    }

    fn new(window: Window) -> Self {
        const { assert!(K::BYTES.is_power_of_two() && K::BYTES <= SECTOR, "an entry lies in one sector") };
        Self { window, changes: Changes::default(), kind: PhantomData }
    }

    /// The entry at byte `at` of the file, changed or not. If it has to be read, those up to byte `end` are read with it, as far
    /// as there is room: the end of the table, or of what is asked for next.
    ///
    /// # Errors
    /// I/O errors; [`ErrorCode::InternalOverflow`](instar_guest_abi::ErrorCode::InternalOverflow) for a place that is no
    /// multiple of the width of an entry.
    pub fn get(&mut self, io: &mut dyn BlockIo, at: u64, end: u64) -> DriverResult<K::Number> {
        if !at.is_multiple_of(K::BYTES) {
            return Err(overflow("the place of an entry"));
        }
        if let Some(number) = self.changed(at) {
            return Ok(number);
        }
        self.window.hold(io, at, end)?;
        Ok(K::decode(self.window.bytes(at, K::BYTES)))
    }

    /// The entry at byte `at` of the file, if its sector has changes that were not written yet. It may name what lies behind
    /// the end that the file has by now.
    #[must_use]
    pub fn changed(&self, at: u64) -> Option<K::Number> {
        self.changes.get(at, usize::try_from(K::BYTES).ok()?).map(K::decode)
    }

    /// Change the entry at byte `at` of the file, in memory. `end` is that of [`Table::get`]: up to there the table goes on.
    ///
    /// # Errors
    /// As [`Table::get`].
    pub fn set(&mut self, io: &mut dyn BlockIo, at: u64, end: u64, number: K::Number) -> DriverResult<()> {
        // The window holds the sector then, unless the changes do.
        self.get(io, at, end)?;
        self.changes.set((at, end), K::encode(number).as_ref(), || self.window.sector(at))
    }

    /// Whether any entry was changed and not written.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Whether changed entries have to be [written](Table::write) before others are changed.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.changes.is_full()
    }

    /// How many entries, from that at byte `at` on, are known to be 0 because they lie in a hole: 1 at least, for that one.
    /// Nothing is known before [`Table::get`] has returned 0 for it.
    #[must_use]
    pub fn zeroes(&self, at: u64) -> u64 {
        let Some(end) = self.window.hole_end(at) else { return 1 };
        let end = self.changes.next_from(at - at % SECTOR).map_or(end, |changed| end.min(changed));
        (end.saturating_sub(at) / K::BYTES).max(1)
    }

    /// Whether the entries from byte `range.start` to byte `range.end` of the file are known to be 0 because they lie in a hole.
    ///
    /// # Errors
    /// As [`Table::get`].
    pub fn is_hole(&mut self, io: &mut dyn BlockIo, range: &Range<u64>) -> DriverResult<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        let is_zero = self.get(io, range.start, range.end)? == K::Number::default();
        Ok(is_zero && self.zeroes(range.start).saturating_mul(K::BYTES) >= range.end - range.start)
    }

    /// Hand each entry that is not 0 to `each`, of `count` entries from byte `start` of the file on, ascending.
    ///
    /// # Errors
    /// Those of `each`; as [`Table::get`].
    pub fn each(
        &mut self,
        io: &mut dyn BlockIo,
        start: u64,
        count: u64,
        each: EachEntry<'_, K::Number>,
    ) -> DriverResult<()> {
        let place = |index: u64| start.saturating_add(index.saturating_mul(K::BYTES));
        let mut index = 0;
        while index < count {
            let number = self.get(io, place(index), place(count))?;
            if number == K::Number::default() {
                index = index.saturating_add(self.zeroes(place(index)));
                continue;
            }
            each(io, index, number)?;
            index += 1;
        }
        Ok(())
    }

    /// Flush what was written so far, and then write the changed entries, in one batch. They are not durable when this returns:
    /// the next flush makes them so. Without changes, nothing happens.
    ///
    /// The flush is what makes a power loss harmless: whatever subset of the entries is on the disk then, each names a cluster
    /// whose data, and whose room in the file, are durable. A table that names other tables is written after those.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter) -> DriverResult<()> {
        if self.is_changed() {
            out.barrier(io)?;
            self.window.forget();
            self.changes.write(io, out)?;
        }
        Ok(())
    }

    /// Make every entry from byte `range.start` to byte `range.end` of the file 0, where it is not, and that durable. Changes
    /// that were not written are lost.
    ///
    /// A power loss before the end leaves some of the entries. The flush at the end comes before the space that they named is
    /// given back: the other way round, entries would name what is not there.
    ///
    /// # Errors
    /// As [`Table::get`].
    pub fn clear(&mut self, io: &mut dyn BlockIo, out: &mut OrderedWriter, range: &Range<u64>) -> DriverResult<()> {
        self.changes = Changes::default();
        self.window.forget();
        let mut batch = Batch::new();
        let count = range.end.saturating_sub(range.start) / K::BYTES;
        self.each(io, range.start, count, &mut |io, index, _| {
            // Entries that follow each other become one request.
            batch.push(Request::zero(out.device(), range.start + index * K::BYTES, K::BYTES));
            if batch.len() >= BATCH {
                batch.submit_to(io, out)?;
            }
            Ok(())
        })?;
        batch.submit_to(io, out)?;
        self.window.forget();
        out.barrier(io)
    }

    /// Drop what was read, and keep what was changed: the file is another one now, and its holes are others.
    pub fn forget(&mut self) {
        self.window.forget();
    }
}
