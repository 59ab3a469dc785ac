//! One image as the guest sees it: a dumb block device.

use super::direct::Direct;
use super::salvage::Salvaged;
use super::zeroes::{Seek, Zeroes};
use super::{retry, writeback, zero};
use instar_guest_abi::DeviceRole;
use std::cell::{OnceCell, RefCell};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

/// One image.
#[derive(Debug)]
pub struct Device {
    pub(super) file: Arc<File>,
    pub(super) role: DeviceRole,
    pub(super) length: u64,
    pub(super) max_length: u64,
    pub(super) fixed_length: bool,
    /// It is read and written past the page cache.
    pub(super) direct: Option<Direct>,
    /// What direct I/O on it would be like, if that is possible: asked for once.
    pub(super) possible: OnceCell<Option<Direct>>,
    /// A flush will come, and will wait: writing begins before.
    pub(super) eager: bool,
    /// What is given back of it is overwritten before.
    pub(super) wiped: bool,
    /// Something was written since the last flush.
    pub(super) dirty: bool,
    /// Something was written at all.
    pub(super) changed: bool,
    /// What cannot be read of it is zero in copies, and noted here.
    pub(super) salvage: Option<RefCell<Salvaged>>,
    /// Which parts of it read as zeroes, as far as anybody has asked.
    pub(super) zeroes: RefCell<Zeroes>,
}

impl Device {
    /// Make a device from an open file. `length` is its present and `max_length` its maximum length in bytes.
    #[must_use]
    pub fn new(file: File, writable: bool, length: u64, max_length: u64, fixed_length: bool) -> Self {
        let max_length = if fixed_length { length } else { max_length.max(length) };
        Self {
            file: Arc::new(file),
            role: if writable { DeviceRole::Target } else { DeviceRole::Read },
            length,
            max_length,
            fixed_length,
            direct: None,
            possible: OnceCell::new(),
            eager: false,
            wiped: false,
            dirty: false,
            changed: false,
            salvage: None,
            zeroes: RefCell::default(),
        }
    }

    /// Give it another role in the operation than [`Device::new`] does, which makes it a target or read-only.
    #[must_use]
    pub fn with_role(self, role: DeviceRole) -> Self {
        Self { role, ..self }
    }

    /// Return its maximum length in bytes; the length of a block device is fixed.
    #[must_use]
    pub fn max_length(&self) -> u64 {
        self.max_length
    }

    /// Whether the guest changed it, or tried to.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.changed
    }

    /// What direct I/O on it would be like, if the kernel says that it is possible.
    pub(super) fn direct_possible(&self) -> Option<Direct> {
        *self.possible.get_or_init(|| Direct::possible(&self.file))
    }

    /// Whether something was written since the last flush.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// Return its file.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Bytes that the file takes on the disk. A block device does not say, nor do some file systems (FUSE's among them):
    /// of those it is the length.
    pub(super) fn allocated(&self) -> u64 {
        let blocks = self.file.metadata().map_or(0, |metadata| metadata.blocks());
        match blocks {
            0 if self.fixed_length || self.file.data(0) == Some(0) => self.length,
            _ => blocks.saturating_mul(512),
        }
    }

    /// Read up to `out.len()` bytes at `offset`; fewer only at the end of the file, or when interrupted.
    pub(crate) fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<usize> {
        match self.direct {
            Some(direct) => direct.read_at(&self.file, offset, out),
            None => self.file.read_at(out, offset),
        }
    }

    /// Return the unreadable byte ranges, which were copied as zeroes, and their total length, which is larger than that of the
    /// ranges if there were too many to keep.
    #[must_use]
    pub fn salvaged(&self) -> (Vec<Range<u64>>, u64) {
        self.salvage.as_ref().map_or_else(Default::default, |salvaged| salvaged.borrow().found())
    }

    /// Read all of `out` at `offset`; past the end of the file there are zeroes.
    pub(crate) fn read_padded(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < out.len() {
            match self.read_at(offset.saturating_add(done as u64), &mut out[done..]) {
                Ok(0) => {
                    out[done..].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Write all of `bytes` at `offset`.
    pub(super) fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.note_data(offset, bytes.len() as u64);
        match self.direct {
            Some(direct) => {
                let length = if self.fixed_length { self.length } else { self.file.metadata()?.len() };
                direct.write_all_at(&self.file, offset, bytes, length)
            }
            None => self.file.write_all_at(bytes, offset),
        }
    }

    /// Find the next data within `from..end` and return its bounds; `(end, end)` if the whole range is a hole. Everything is
    /// data on a block device, and where the file system does not answer. Answers are remembered.
    #[must_use]
    pub fn next_data(&self, from: u64, end: u64) -> (u64, u64) {
        if self.fixed_length || from >= end {
            return (from, end);
        }
        self.zeroes.borrow_mut().next_data(&*self.file, from, end)
    }

    /// Whether a range is known to read as zeroes: because the file grew there, or because it was zeroed before.
    pub(super) fn reads_as_zero(&self, offset: u64, length: u64) -> bool {
        self.zeroes.borrow().all_zero(offset, offset.saturating_add(length))
    }

    /// A range is about to be written, whether or not that succeeds.
    pub(super) fn note_data(&self, offset: u64, length: u64) {
        self.zeroes.borrow_mut().note(offset, offset.saturating_add(length), false);
    }

    /// Make a range within the file read as zero. One that does already is left alone, unless its space is to be given back.
    pub(super) fn zero(&self, offset: u64, length: u64, discard: bool) -> io::Result<()> {
        if !discard && self.reads_as_zero(offset, length) {
            return Ok(());
        }
        self.note_data(offset, length);
        match self.direct {
            Some(direct) => direct.buffered(&self.file, |file| zero::zero(file, offset, length, discard))?,
            None => zero::zero(&self.file, offset, length, discard)?,
        }
        if !discard || self.wiped {
            self.zeroes.borrow_mut().note(offset, offset.saturating_add(length), true);
        }
        Ok(())
    }

    /// Change the length of the file, in bytes.
    pub(super) fn set_length(&mut self, length: u64) -> io::Result<()> {
        let before = self.file.metadata()?.len();
        self.zeroes.get_mut().forget(length.min(before), u64::MAX);
        retry(|| rustix::fs::ftruncate(&self.file, length))?;
        self.zeroes.get_mut().note(before, length, true);
        self.length = length;
        Ok(())
    }

    /// These bytes were written: the disk may begin, if they are many.
    pub(super) fn begin_writeback(&self, offset: u64, length: u64) {
        if self.eager {
            writeback::begin(&self.file, offset, length);
        }
    }

    /// Mark the device dirty before writing; even a failed write may have changed it.
    pub(super) fn touch(&mut self) {
        self.dirty = true;
        self.changed = true;
    }

    /// These bytes were written. Where there are none, the file is as long as it was.
    pub(super) fn written(&mut self, offset: u64, length: u64) {
        if length != 0 {
            self.length = self.length.max(offset.saturating_add(length));
        }
    }
}
