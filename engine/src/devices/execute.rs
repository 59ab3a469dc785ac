//! The execution of the requests of one doorbell, in order, each checked first.

use super::check::check;
use super::merge::Batch;
use super::wipe::Wiped;
use super::{index, parallel_copy, retry, transfer, zero_writes, Cache, Devices, ZeroWrites};
use crate::sandbox::{BadRequest, BufferAccess};
use instar_guest_abi::{request_flags, request_status, Request, RequestOp};
use std::io;

impl Devices {
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
    pub(super) fn flush(&mut self, number: u32) -> io::Result<()> {
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
