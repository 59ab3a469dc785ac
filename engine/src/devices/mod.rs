//! The images as the guest sees them: dumb block devices.
//!
//! Each is a descriptor that was opened once, with a mode and a bound on its length. The guest requests reads, writes, copies,
//! zeroing, flushes and changes of length in batches; the host checks every request before it executes it, and ends a guest
//! that breaks a rule.

mod aligned;
mod allowance;
mod before_change;
mod cache;
mod check;
mod clone;
mod compare;
mod copy;
mod direct;
mod evict;
pub mod lock;
mod merge;
mod pace;
mod parallel_copy;
mod phases;
mod piece;
mod salvage;
mod statistics;
mod transfer;
mod wipe;
mod workers;
mod writeback;
mod zero;
mod zero_writes;
mod zeroes;

pub(crate) use aligned::AlignedBuffer;
pub use before_change::{Before, BeforeChange};
pub use cache::Cache;
pub(crate) use compare::first_difference;
pub use compare::{Comparison, Unequal, COMPARED};
pub use pace::{Pace, Watch};
pub use phases::Phases;
pub use statistics::Statistics;
pub use workers::Workers;
pub(crate) use zero::zero_within as make_zero;
pub use zero_writes::ZeroWrites;

use crate::sandbox::{BadRequest, BufferAccess, Excess};
use allowance::Allowance;
use check::check;
use copy::Copier;
use direct::Direct;
use instar_guest_abi::{
    request_flags, request_status, DeviceRole, Request, RequestOp, FIRST_FILE_DEVICE, MAX_FILE_DEVICES,
};
use merge::Batch;
use salvage::Salvaged;
use std::cell::{OnceCell, RefCell};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use wipe::Wiped;
use zeroes::{Seek, Zeroes};

/// One image.
#[derive(Debug)]
pub struct Device {
    file: Arc<File>,
    role: DeviceRole,
    length: u64,
    max_length: u64,
    fixed_length: bool,
    /// It is read and written past the page cache.
    direct: Option<Direct>,
    /// What direct I/O on it would be like, if that is possible: asked for once.
    possible: OnceCell<Option<Direct>>,
    /// A flush will come, and will wait: writing begins before.
    eager: bool,
    /// What is given back of it is overwritten before.
    wiped: bool,
    /// Something was written since the last flush.
    dirty: bool,
    /// Something was written at all.
    changed: bool,
    /// What cannot be read of it is zero in copies, and noted here.
    salvage: Option<RefCell<Salvaged>>,
    /// Which parts of it read as zeroes, as far as anybody has asked.
    zeroes: RefCell<Zeroes>,
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
    fn direct_possible(&self) -> Option<Direct> {
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
    fn allocated(&self) -> u64 {
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
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
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
    fn reads_as_zero(&self, offset: u64, length: u64) -> bool {
        self.zeroes.borrow().all_zero(offset, offset.saturating_add(length))
    }

    /// A range is about to be written, whether or not that succeeds.
    fn note_data(&self, offset: u64, length: u64) {
        self.zeroes.borrow_mut().note(offset, offset.saturating_add(length), false);
    }

    /// Make a range within the file read as zero. One that does already is left alone, unless its space is to be given back.
    fn zero(&self, offset: u64, length: u64, discard: bool) -> io::Result<()> {
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
    fn set_length(&mut self, length: u64) -> io::Result<()> {
        let before = self.file.metadata()?.len();
        self.zeroes.get_mut().forget(length.min(before), u64::MAX);
        retry(|| rustix::fs::ftruncate(&self.file, length))?;
        self.zeroes.get_mut().note(before, length, true);
        self.length = length;
        Ok(())
    }

    /// These bytes were written: the disk may begin, if they are many.
    fn begin_writeback(&self, offset: u64, length: u64) {
        if self.eager {
            writeback::begin(&self.file, offset, length);
        }
    }

    /// Mark the device dirty before writing; even a failed write may have changed it.
    fn touch(&mut self) {
        self.dirty = true;
        self.changed = true;
    }

    /// These bytes were written. Where there are none, the file is as long as it was.
    fn written(&mut self, offset: u64, length: u64) {
        if length != 0 {
            self.length = self.length.max(offset.saturating_add(length));
        }
    }
}

/// One more than the highest number of a device.
const MAX_DEVICES: usize = FIRST_FILE_DEVICE as usize + MAX_FILE_DEVICES;

/// The devices of a chain.
#[derive(Debug, Default)]
pub struct Devices {
    slots: Vec<Option<Device>>,
    copier: Copier,
    workers: Option<Workers>,
    phases: Phases,
    pace: Pace,
    cache: Cache,
    /// Whether flushes are left to the code that gives the target its name.
    unnamed: bool,
    /// What becomes of zeroes that are written.
    zero_writes: ZeroWrites,
    statistics: Statistics,
    allowance: Allowance,
    /// Who is asked before bytes of the target change.
    keeper: Option<Rc<RefCell<dyn BeforeChange>>>,
}

/// The index of a device number.
fn index(device: u32) -> usize {
    usize::try_from(device).unwrap_or(usize::MAX)
}

impl Devices {
    /// Make an empty set of devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Attach a device under a number below [`FIRST_FILE_DEVICE`] + [`MAX_FILE_DEVICES`]. Others are ignored.
    pub fn attach(&mut self, number: u32, device: Device) {
        let place = index(number);
        debug_assert!(place < MAX_DEVICES);
        if place >= MAX_DEVICES {
            return;
        }
        if place >= self.slots.len() {
            self.slots.resize_with(place + 1, || None);
        }
        self.allowance.add(device.allocated());
        if let Some(slot) = self.slots.get_mut(place) {
            *slot = Some(device);
        }
    }

    /// Return the pace of data, its observer, and its brake.
    pub fn pace_mut(&mut self) -> &mut Pace {
        &mut self.pace
    }

    /// Set the threads that copy large amounts of data in parallel.
    pub fn set_workers(&mut self, workers: Option<Workers>) {
        self.workers = workers;
    }

    /// What a flush, and a write, promise.
    ///
    /// # Errors
    /// The number of a device whose file system knows no direct I/O, and what it says.
    pub fn set_cache(&mut self, cache: Cache) -> Result<(), (u32, io::Error)> {
        self.cache = cache;
        for (number, device) in (0u32..).zip(&mut self.slots) {
            let Some(device) = device else { continue };
            device.eager = matches!(cache, Cache::Writeback | Cache::Writethrough);
            if cache.is_direct() {
                device.direct = Some(Direct::begin(&device.file).map_err(|error| (number, error))?);
            }
        }
        Ok(())
    }

    /// Ignore the guest's flushes of the target: it is a new file that nobody can see before it is complete and flushed. A
    /// crash before that leaves nothing of it, so the order in which its parts reach the disk does not matter.
    pub fn leave_flushes_to_the_end(&mut self) {
        self.unnamed = true;
    }

    /// What becomes of zeroes that are written, instead of writing them.
    pub fn set_zero_writes(&mut self, way: ZeroWrites) {
        self.zero_writes = way;
    }

    /// Return the counters of the data that was moved so far.
    #[must_use]
    pub fn stats(&self) -> &Statistics {
        &self.statistics
    }

    /// Whether the guest changed any of them, or tried to.
    #[must_use]
    pub fn any_changed(&self) -> bool {
        self.slots.iter().flatten().any(Device::is_changed)
    }

    /// Count bytes of a device that the host read because the guest claimed data there.
    pub fn count_read(&mut self, device: u32, bytes: u64) {
        self.allowance.count(&Request::read(device, 0, 0, bytes));
    }

    /// Return the work of the guest that is out of proportion to the allocated size of the files, if nothing has changed yet.
    /// `used` is the guest's processor time.
    #[must_use]
    pub fn excess(&self, used: Duration) -> Option<Excess> {
        self.allowance.excess(used).filter(|_| !self.any_changed())
    }

    /// Copy unreadable sectors of this device as zeroes from now on.
    pub fn salvage(&mut self, number: u32) {
        if let Ok(device) = self.device_mut(number) {
            device.salvage = Some(RefCell::default());
        }
    }

    /// Return the device with this number.
    #[must_use]
    pub fn device(&self, number: u32) -> Option<&Device> {
        self.slots.get(index(number))?.as_ref()
    }

    fn device_mut(&mut self, number: u32) -> io::Result<&mut Device> {
        let device = self.slots.get_mut(index(number)).and_then(Option::as_mut);
        device.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// Execute requests with the effect of strict order. The first that fails gets its errno as status; those after it keep
    /// theirs.
    ///
    /// # Errors
    /// A request that breaks a rule; the requests before it were executed.
    pub fn execute(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        let mut at = 0;
        let mut wiped = Wiped::default();
        requests.iter().for_each(|request| self.allowance.count(request));
        if let Err(error) = self.ask_before(requests) {
            fail(requests.first_mut(), &error);
            return Ok(());
        }
        while let Some(rest) = requests.get_mut(at..).filter(|rest| !rest.is_empty()) {
            if let Err(error) = self.wipe_before(&mut wiped, at, memory, rest)? {
                fail(rest.first_mut(), &error);
                return Ok(());
            }
            // Neighbors that go on from each other are one operation; each is checked by itself first.
            let batch = Batch::take(rest, |request| check(self, memory, request))?;
            let batches = if self.copies_in_parallel(&batch) {
                Batch::parallel(batch, rest, |request| check(self, memory, request))
            } else {
                vec![batch]
            };
            let (mut complete, mut result) = self.execute_batches(memory, &batches);
            if let (Some(first), true, Ok(())) = (batches.first(), self.cache.flushes_writes(), &result) {
                if !matches!(first.op, RequestOp::Read | RequestOp::NextData | RequestOp::Length) {
                    result = self.flush(first.whole.device);
                    complete = if result.is_ok() { complete } else { 0 };
                }
            }
            for batch in batches.get(..complete).unwrap_or_default() {
                for request in requests.iter_mut().skip(at).take(batch.count()) {
                    request.status = request_status::OK;
                    match batch.op {
                        RequestOp::NextData => self.answer(request),
                        RequestOp::Length => {
                            request.length = self.device(request.device).map_or(0, |device| device.length)
                        }
                        _ => {}
                    }
                }
                at += batch.count();
            }
            if let Err(error) = result {
                // The merged requests were a single operation: it failed as a whole.
                fail(requests.get_mut(at), &error);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Replace the range of a NEXT_DATA with that of the data.
    fn answer(&self, request: &mut Request) {
        let Some(device) = self.device(request.device) else { return };
        let (data, end) = device.next_data(request.offset, request.offset.saturating_add(request.length));
        (request.offset, request.length) = (data, end.saturating_sub(data));
    }

    /// Whether there is somebody to copy this, and others like it, side by side. Not within one file: what is written directly
    /// would be read directly, too.
    fn copies_in_parallel(&self, batch: &Batch) -> bool {
        batch.copies_between_two() && self.workers.is_some() && !self.pace.is_limited()
    }

    /// Execute operations, several only if they are copies that may be under way at the same time. Returns how many are
    /// complete: all, or those before the one that failed.
    fn execute_batches(&mut self, memory: &dyn BufferAccess, batches: &[Batch]) -> (usize, io::Result<()>) {
        let bytes: u64 = batches.iter().map(|batch| batch.whole.length).fold(0, u64::saturating_add);
        if let (Some(first), true) = (batches.first(), bytes >= parallel_copy::LEAST) {
            if self.copies_in_parallel(first) {
                return self.copy_in_parallel(batches);
            }
        }
        for (index, batch) in batches.iter().enumerate() {
            if let Err(error) = self.execute_batch(memory, batch) {
                return (index, Err(error));
            }
        }
        (batches.len(), Ok(()))
    }

    /// Copies into one device, side by side.
    fn copy_in_parallel(&mut self, batches: &[Batch]) -> (usize, io::Result<()>) {
        let number = batches.first().map_or(u32::MAX, |batch| batch.whole.device);
        let Self { slots, copier, workers, pace, statistics, .. } = self;
        let Some(workers) = workers else { return (0, Ok(())) };
        if let Some(target) = slots.get_mut(index(number)).and_then(Option::as_mut) {
            target.touch();
        }
        let requests: Vec<&Request> = batches.iter().map(|batch| &batch.whole).collect();
        let slot = |number: u32| slots.get(index(number)).and_then(Option::as_ref);
        let (complete, result) = copier.copy_in_parallel(slot, &requests, workers, pace, statistics);
        if let Ok(target) = self.device_mut(number) {
            batches.iter().take(complete).for_each(|batch| target.written(batch.whole.offset, batch.whole.length));
        }
        (complete, result)
    }

    /// Make everything that was written to a device durable, as far as the cache mode promises it.
    fn flush(&mut self, number: u32) -> io::Result<()> {
        let (cache, unnamed) = (self.cache, self.unnamed);
        let device = self.device_mut(number)?;
        if device.dirty {
            if cache != Cache::Unsafe && !unnamed {
                retry(|| rustix::fs::fdatasync(&device.file))?;
                self.statistics.flushes += 1;
            }
            self.device_mut(number)?.dirty = false;
        }
        Ok(())
    }

    fn execute_batch(&mut self, memory: &dyn BufferAccess, batch: &Batch) -> io::Result<()> {
        let Request { device, offset, .. } = batch.whole;
        let length = batch.whole.length;
        match batch.op {
            RequestOp::Read => {
                transfer::read(self.device_mut(device)?, memory, batch)?;
                self.statistics.read += length;
                self.pace.read(length);
            }
            RequestOp::Write => {
                let way = self.zero_writes;
                let zeroes =
                    way != ZeroWrites::Written && length >= zero_writes::WORTH && transfer::is_zero(memory, batch)?;
                let target = self.device_mut(device)?;
                target.touch();
                if !zeroes || !target.take_zeroes(way, offset, length)? {
                    transfer::write(target, memory, batch)?;
                }
                target.begin_writeback(offset, length);
                target.written(offset, length);
                self.statistics.written += length;
                self.pace.moved(length)?;
            }
            RequestOp::Copy => {
                self.device_mut(device)?.touch();
                let slot = |number| self.slots.get(index(number)).and_then(Option::as_ref);
                let (source, target) = (slot(batch.whole.src_device), slot(device));
                let (Some(source), Some(target)) = (source, target) else {
                    return Err(io::Error::from_raw_os_error(libc::ENODEV));
                };
                self.copier.copy((source, target), &batch.whole, &mut self.pace, &mut self.statistics)?;
                self.device_mut(device)?.written(offset, length);
            }
            RequestOp::Zero => {
                let target = self.device_mut(device)?;
                target.touch();
                let length = length.min(target.length.saturating_sub(offset));
                target.zero(offset, length, batch.whole.flags & request_flags::DISCARD != 0)?;
                self.statistics.zeroed += length;
                self.pace.passed(length);
            }
            RequestOp::Flush => {
                self.flush(device)?;
            }
            // It is answered where its status is set.
            RequestOp::NextData | RequestOp::Length => {}
            RequestOp::SetLength => {
                let target = self.device_mut(device)?;
                if !target.fixed_length {
                    target.touch();
                    target.set_length(offset)?;
                }
            }
        }
        Ok(())
    }
}

/// Give a request the status of its error.
fn fail(request: Option<&mut Request>, error: &io::Error) {
    if let Some(request) = request {
        request.status = error.raw_os_error().filter(|&errno| errno > 0).unwrap_or(libc::EIO);
    }
}

/// A system call, again as long as a signal interrupts it.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    rustix::io::retry_on_intr(&mut call).map_err(io::Error::from)
}

#[cfg(test)]
mod tests;
