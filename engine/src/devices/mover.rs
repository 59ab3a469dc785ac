//! Executes the requests of a doorbell.

use super::cache::CacheMode;
use super::check::{check, overlap};
use super::copy::{retry, Copier, Side};
use super::device::{Device, DeviceSet};
use super::stats::IoStats;
use super::transfer::{transfer, Direction, Failed};
use super::zero::{zero, Purpose};
use crate::vm::{BadRequest, BufferAccess};
use instar_guest_abi::{request_flags, request_status, Request, RequestOp};
use rustix::fd::AsFd;
use rustix::io::Errno;

/// The devices, and the mover of their blocks.
#[derive(Debug)]
pub struct BlockMover {
    devices: DeviceSet,
    cache: CacheMode,
    stop: fn() -> bool,
    copier: Copier,
    stats: IoStats,
}

impl BlockMover {
    /// A mover for these devices. `stop` is asked between long steps: `true` fails the request at hand with EINTR.
    #[must_use]
    pub fn new(devices: DeviceSet, cache: CacheMode, stop: fn() -> bool) -> Self {
        Self { devices, cache, stop, copier: Copier::default(), stats: IoStats::default() }
    }

    /// The devices.
    #[must_use]
    pub fn devices(&self) -> &DeviceSet {
        &self.devices
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> IoStats {
        self.stats
    }

    /// Execute requests strictly in order, and set each `status`; stop at the first that fails. Requests that go on from
    /// each other are executed as one. Nothing is executed unless every request keeps the rules.
    ///
    /// # Errors
    /// [`BadRequest`] when a request breaks a rule.
    pub fn execute(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        for request in requests.iter_mut() {
            request.status = request_status::NOT_RUN;
        }
        let ops = requests.iter().map(|r| check(&self.devices, memory, r)).collect::<Result<Vec<_>, _>>()?;
        let mut start = 0;
        while let Some(&op) = ops.get(start) {
            let end = self.run_end(op, requests, &ops, start);
            let run = &mut requests[start..end];
            match self.run(op, memory, run) {
                Ok(()) => run.iter_mut().for_each(|request| request.status = request_status::OK),
                Err(failed) => {
                    blame(run, failed);
                    return Ok(());
                }
            }
            start = end;
        }
        Ok(())
    }

    /// The end of the requests from `start` on that can be executed as one.
    fn run_end(&self, op: RequestOp, requests: &[Request], ops: &[RequestOp], start: usize) -> usize {
        let mut end = start + 1;
        let Some(first) = requests.get(start) else { return end };
        while let (Some(last), Some(next)) = (requests.get(end - 1), requests.get(end)) {
            let goes_on = ops.get(end) == Some(&op)
                && next.device == first.device
                && last.offset + last.length == next.offset
                && match op {
                    RequestOp::Read | RequestOp::Write => true,
                    RequestOp::Zero => next.flags == first.flags,
                    RequestOp::Copy => {
                        let (src_end, end) = (next.src_offset + next.length, next.offset + next.length);
                        next.src_device == first.src_device
                            && last.src_offset + last.length == next.src_offset
                            && !(self.is_same_file(next.device, next.src_device)
                                && overlap(first.offset, end, first.src_offset, src_end))
                    }
                    RequestOp::Flush | RequestOp::SetLength => false,
                };
            if !goes_on {
                break;
            }
            end += 1;
        }
        end
    }

    fn is_same_file(&self, a: u32, b: u32) -> bool {
        let identity = |number| self.devices.get(number).map(|device| device.image().identity());
        identity(a) == identity(b)
    }

    /// Execute requests that go on from each other as one.
    fn run(&mut self, op: RequestOp, memory: &dyn BufferAccess, run: &[Request]) -> Result<(), Failed> {
        let Some(first) = run.first() else { return Ok(()) };
        let length: u64 = run.iter().map(|request| request.length).sum();
        let Self { devices, cache, stop, copier, stats } = self;
        let absent = Failed { done: 0, errno: Errno::NODEV };
        let stop: &dyn Fn() -> bool = stop;
        let source = match op {
            RequestOp::Copy => {
                Some(devices.get(first.src_device).ok_or(absent)?.side(first.src_device, first.src_offset))
            }
            _ => None,
        };
        match op {
            RequestOp::Read | RequestOp::Write => {
                let slices: Vec<_> = run.iter().filter_map(|r| memory.heap_slice(r.buffer, r.length)).collect();
                let device = devices.get_mut(first.device).ok_or(absent)?;
                if op == RequestOp::Read {
                    stats.calls += transfer(device.image.as_fd(), Direction::Read, first.offset, &slices)?;
                    stats.guest_read += length;
                    return Ok(());
                }
                device.note_change(0);
                let result = transfer(device.image.as_fd(), Direction::Write, first.offset, &slices);
                stats.calls += device.settle(first.offset + length, result)?;
                stats.guest_written += length;
                Ok(())
            }
            RequestOp::Copy => {
                let (Some(from), Some(device)) = (source, devices.get(first.device)) else { return Err(absent) };
                let result = copier.copy(from, device.side(first.device, first.offset), length, stop, stats);
                let device = devices.get_mut(first.device).ok_or(absent)?;
                device.note_change(0);
                device.settle(first.offset + length, result)
            }
            RequestOp::Zero => {
                let device = devices.get_mut(first.device).ok_or(absent)?;
                let end = (first.offset + length).min(device.length);
                let give_back = first.flags & request_flags::DISCARD != 0;
                let purpose = if give_back { Purpose::GiveBack } else { Purpose::ReadAsZero };
                if first.offset < end {
                    device.note_change(0);
                    stats.calls += 1;
                    zero(&device.image, first.offset, end - first.offset, purpose, stop)?;
                    stats.zeroed += end - first.offset;
                }
                Ok(())
            }
            RequestOp::Flush => {
                let device = devices.get_mut(first.device).ok_or(absent)?;
                if !device.dirty || !cache.honours_flush() {
                    stats.flushes_skipped += 1;
                    return Ok(());
                }
                stats.flushes += 1;
                retry(|| rustix::fs::fdatasync(&device.image)).map_err(|errno| Failed { done: 0, errno })?;
                device.dirty = false;
                Ok(())
            }
            RequestOp::SetLength => devices.get_mut(first.device).ok_or(absent)?.set_length(first.offset),
        }
    }
}

impl Device {
    fn side(&self, number: u32, offset: u64) -> Side<'_> {
        let (file_length, block_device) = (self.length, self.image.is_block_device());
        Side { fd: self.image.as_fd(), number, offset, file_length, block_device }
    }

    /// Note how long the device is after a change that was to reach to `end`.
    fn settle<T>(&mut self, end: u64, result: Result<T, Failed>) -> Result<T, Failed> {
        if result.is_ok() {
            self.note_change(end);
        } else if let Ok(length) = self.image.current_length() {
            self.length = length;
        }
        result
    }

    /// A block device keeps its length: what the request gives up is not used any more, that is all.
    fn set_length(&mut self, length: u64) -> Result<(), Failed> {
        if self.image.is_block_device() || length == self.length {
            return Ok(());
        }
        self.note_change(0);
        retry(|| rustix::fs::ftruncate(&self.image, length)).map_err(|errno| Failed { done: 0, errno })?;
        self.length = length;
        Ok(())
    }
}

/// Set the statuses of a run that failed: the request in which it failed gets the errno.
fn blame(run: &mut [Request], failed: Failed) {
    let mut end = 0u64;
    for request in run {
        end = end.saturating_add(request.length);
        if end <= failed.done && request.length > 0 {
            request.status = request_status::OK;
        } else {
            request.status = failed.errno.raw_os_error();
            return;
        }
    }
}
