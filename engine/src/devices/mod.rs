//! The images as the guest sees them: dumb block devices.
//!
//! Each is a descriptor that was opened once, with a mode and a bound on its length. The guest asks for reads, writes,
//! copies, zeroing, flushes and changes of length in batches; every request is [checked](check) before it is
//! executed, and one that breaks a rule ends the guest.

mod check;
mod copy;
pub mod lock;
mod merge;
mod pace;
mod statistics;
mod transfer;
mod zero;

pub use pace::{Pace, Watch};
pub use statistics::Statistics;

use crate::vm::{BadRequest, BufferAccess};
use check::check;
use copy::Copier;
use instar_guest_abi::{request_flags, request_status, Request, RequestOp, DEVICE_OUTPUT, MAX_CHAIN_DEVICES};
use merge::Batch;
use std::fs::File;
use std::io;

/// One image.
#[derive(Debug)]
pub struct Device {
    file: File,
    writable: bool,
    length: u64,
    max_length: u64,
    fixed_length: bool,
    /// Something was written since the last flush.
    dirty: bool,
    /// Something was written at all.
    changed: bool,
}

impl Device {
    /// A device over an open file. `length` and `max_length` are bytes: what it has, and what it may become.
    #[must_use]
    pub fn new(file: File, writable: bool, length: u64, max_length: u64, fixed_length: bool) -> Self {
        let max_length = if fixed_length { length } else { max_length.max(length) };
        Self { file, writable, length, max_length, fixed_length, dirty: false, changed: false }
    }

    /// What it may become at most, in bytes: a block device stays as long as it is.
    #[must_use]
    pub fn max_length(&self) -> u64 {
        self.max_length
    }

    /// Whether the guest changed it, or tried to.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.changed
    }

    /// It is about to be changed: whether or not that succeeds, it may be.
    fn touch(&mut self) {
        self.dirty = true;
        self.changed = true;
    }

    /// Bytes up to `end` were written.
    fn written_to(&mut self, end: u64) {
        self.length = self.length.max(end);
    }
}

/// What a flush, and a write, promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// After a flush, everything before it is durable.
    #[default]
    Writeback,
    /// Everything is durable before the guest is told that it is done.
    Writethrough,
    /// Nothing is promised: for images that can be thrown away.
    Unsafe,
}

/// The devices of a chain.
#[derive(Debug, Default)]
pub struct Devices {
    slots: [Option<Device>; MAX_CHAIN_DEVICES + 1],
    copier: Copier,
    pace: Pace,
    cache: Cache,
    statistics: Statistics,
}

/// The index of a device number.
fn index(device: u32) -> usize {
    usize::try_from(device).unwrap_or(usize::MAX)
}

impl Devices {
    /// No devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Attach a device at a slot: 0 to [`MAX_CHAIN_DEVICES`] - 1, or [`DEVICE_OUTPUT`]. Others are ignored.
    pub fn attach(&mut self, slot: u32, device: Device) {
        debug_assert!(slot <= DEVICE_OUTPUT);
        if let Some(place) = self.slots.get_mut(index(slot)) {
            *place = Some(device);
        }
    }

    /// How fast data moves, who watches, and who may stop it.
    pub fn pace_mut(&mut self) -> &mut Pace {
        &mut self.pace
    }

    /// What a flush, and a write, promise.
    pub fn set_cache(&mut self, cache: Cache) {
        self.cache = cache;
    }

    /// What was moved so far, and how.
    #[must_use]
    pub fn stats(&self) -> &Statistics {
        &self.statistics
    }

    /// The device of this number.
    #[must_use]
    pub fn device(&self, number: u32) -> Option<&Device> {
        self.slots.get(index(number))?.as_ref()
    }

    fn device_mut(&mut self, number: u32) -> io::Result<&mut Device> {
        let device = self.slots.get_mut(index(number)).and_then(Option::as_mut);
        device.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// Execute requests strictly in order. The first that fails gets its errno as status, and those after it are left
    /// as they are.
    ///
    /// # Errors
    /// A request that breaks a rule; the requests before it were executed.
    pub fn execute(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        let mut at = 0;
        while let Some(rest) = requests.get_mut(at..).filter(|rest| !rest.is_empty()) {
            // Neighbours that go on from each other are one operation; each is checked by itself first.
            let batch = Batch::take(rest, |request| check(self, memory, request))?;
            let mut result = self.execute_batch(memory, &batch);
            if self.cache == Cache::Writethrough && result.is_ok() && !matches!(batch.op, RequestOp::Read) {
                result = self.flush(batch.whole.device);
            }
            let errno = match result {
                Ok(()) => request_status::OK,
                // The merged requests were a single operation: it failed as a whole.
                Err(error) => error.raw_os_error().filter(|&errno| errno > 0).unwrap_or(libc::EIO),
            };
            if errno != request_status::OK {
                if let Some(request) = rest.first_mut() {
                    request.status = errno;
                }
                return Ok(());
            }
            for request in rest.iter_mut().take(batch.count()) {
                request.status = request_status::OK;
            }
            at += batch.count();
        }
        Ok(())
    }

    /// Make everything that was written to a device durable, as far as the cache mode promises it.
    fn flush(&mut self, number: u32) -> io::Result<()> {
        let cache = self.cache;
        let device = self.device_mut(number)?;
        if device.dirty {
            if cache != Cache::Unsafe {
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
        let end = offset.saturating_add(length);
        match batch.op {
            RequestOp::Read => {
                transfer::read(&self.device_mut(device)?.file, memory, batch)?;
                self.statistics.read += length;
            }
            RequestOp::Write => {
                let target = self.device_mut(device)?;
                target.touch();
                transfer::write(&target.file, memory, batch)?;
                target.written_to(end);
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
                self.device_mut(device)?.written_to(end);
            }
            RequestOp::Zero => {
                let target = self.device_mut(device)?;
                target.touch();
                let length = length.min(target.length.saturating_sub(offset));
                zero::zero(&target.file, offset, length, batch.whole.flags & request_flags::DISCARD != 0)?;
                self.statistics.zeroed += length;
                self.pace.passed(length);
            }
            RequestOp::Flush => {
                self.flush(device)?;
            }
            RequestOp::SetLength => {
                let target = self.device_mut(device)?;
                if !target.fixed_length {
                    target.touch();
                    retry(|| rustix::fs::ftruncate(&target.file, offset))?;
                    target.length = offset;
                }
            }
        }
        Ok(())
    }
}

/// A system call, again as long as a signal interrupts it.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    rustix::io::retry_on_intr(&mut call).map_err(io::Error::from)
}

#[cfg(test)]
mod tests;
