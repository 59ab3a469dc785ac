//! In-memory devices for tests of drivers and operations.
//!
//! They execute requests as the host does, under the same rules: a request that would end the guest (a change before the plan,
//! of a read-only device or beyond a bound, or a range that overflows) panics. They record every change and flush, so that a
//! test can replay any part of the log as the state of the disk after a crash.

pub use crate::change::Change;
use crate::held::Rules;
use crate::io::{BlockIo, IoFailure};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_abi::{request_status, DeviceConfig, DeviceRole, Phase, Request, RequestOp};

const EIO: u32 = 5;
const EINVAL: u32 = 22;
/// Bytes of a block, which is data or a hole.
const BLOCK: u64 = 4096;

/// Devices in memory, each a `Vec<u8>`, with a log of all changes. They implement [`BlockIo`] for tests of drivers.
#[derive(Clone, Debug, Default)]
pub struct MemoryDevices {
    /// Content by device number.
    pub files: BTreeMap<u32, Vec<u8>>,
    /// The changes, in order.
    pub log: Vec<Change>,
    /// Number of `submit` calls: the exits that a guest would make.
    pub submits: usize,
    /// Bytes that were read, of data and of metadata.
    pub bytes_read: u64,
    /// Whether NEXT_DATA treats aligned 4 KiB blocks of zeroes as holes; if not, everything is data.
    pub holes: bool,
    /// Fail the request with this number (counted from 0 over all submits) with EIO.
    pub fail_at: Option<usize>,
    /// The answer of [`BlockIo::heap_free`] in bytes, if not 48 MiB.
    pub heap: Option<usize>,
    executed: usize,
    rules: Rules,
}

impl MemoryDevices {
    /// Make devices with this content.
    #[must_use]
    pub fn new(files: impl IntoIterator<Item = (u32, Vec<u8>)>) -> Self {
        Self { files: files.into_iter().collect(), ..Self::default() }
    }

    /// Begin an operation on these images, and hold each to its role, the bound of its length, and its other files from here
    /// on. Without this call, device 0 is an overlay that is emptied, the output device is the target, and neither has a bound.
    pub fn hold<'a>(&mut self, images: impl IntoIterator<Item = (DeviceRole, &'a DeviceConfig)>) {
        self.rules = Rules::of(images);
    }

    /// [`MemoryDevices::hold`] for a commit, which empties the overlay unless it is `kept`.
    pub fn hold_commit(&mut self, overlay: &DeviceConfig, kept: bool, target: &DeviceConfig) {
        self.hold([(DeviceRole::Overlay { emptied: !kept, identity: true }, overlay), (DeviceRole::Target, target)]);
    }

    /// Count the requests that were executed so far.
    #[must_use]
    pub fn executed(&self) -> usize {
        self.executed
    }

    /// Return the devices with changes that no flush has made durable: none after an operation.
    #[must_use]
    pub fn unflushed(&self) -> BTreeSet<u32> {
        let mut devices = BTreeSet::new();
        for change in &self.log {
            match change {
                Change::Flush { device } => devices.remove(device),
                changed => devices.insert(changed.device()),
            };
        }
        devices
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.files);
        self.log.push(change);
    }

    fn bytes(&self, device: u32, offset: u64, length: u64) -> Option<Vec<u8>> {
        let file = self.files.get(&device)?;
        let mut bytes = vec![0; usize::try_from(length).ok()?];
        let start = usize::try_from(offset).ok()?.min(file.len());
        let count = bytes.len().min(file.len() - start);
        bytes[..count].copy_from_slice(&file[start..start + count]);
        Some(bytes)
    }

    /// The first data within a range of a device, with the host's granularity.
    fn find_data(&self, device: u32, range: Range<u64>) -> Range<u64> {
        let Some(file) = self.files.get(&device).filter(|_| self.holes) else { return range };
        let data = |block: u64| {
            let start = usize::try_from(block * BLOCK).unwrap_or(usize::MAX);
            let end = usize::try_from((block + 1) * BLOCK).unwrap_or(usize::MAX);
            let bytes = file.get(start..file.len().min(end)).unwrap_or_default();
            bytes.iter().any(|&byte| byte != 0)
        };
        let end = range.end.min(file.len() as u64);
        if range.start >= end {
            // Its last block may hold data in front of the range.
            return range.end..range.end;
        }
        let mut blocks = range.start / BLOCK..end.div_ceil(BLOCK);
        let Some(first) = blocks.find(|&block| data(block)) else { return range.end..range.end };
        let last = blocks.take_while(|&block| data(block)).last().unwrap_or(first);
        (first * BLOCK).max(range.start)..((last + 1) * BLOCK).min(end)
    }

    fn execute(&mut self, request: &mut Request) -> Result<(), u32> {
        let op = RequestOp::from_u32(request.op).ok_or(EINVAL)?;
        if !self.files.contains_key(&request.device) {
            return Err(EINVAL);
        }
        let (device, offset) = (request.device, request.offset);
        let length = usize::try_from(request.length).map_err(|_| EINVAL)?;
        match op {
            RequestOp::Read => {
                self.bytes_read += request.length;
                let bytes = self.bytes(device, offset, request.length).ok_or(EINVAL)?;
                // SAFETY: the contract of `BlockIo::submit`: the caller owns `length` bytes at `buffer`.
                unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), request.buffer as *mut u8, length) };
            }
            RequestOp::Write => {
                // SAFETY: the contract of `BlockIo::submit`: `length` bytes at `buffer` are alive.
                let bytes = unsafe { core::slice::from_raw_parts(request.buffer as *const u8, length) }.to_vec();
                self.change(Change::Write { device, offset, bytes });
            }
            RequestOp::Copy => {
                let bytes = self.bytes(request.src_device, request.src_offset, request.length).ok_or(EINVAL)?;
                self.change(Change::Write { device, offset, bytes });
            }
            RequestOp::Zero => {
                // Like a hole that is punched with the size kept.
                let end = self.files.get(&device).map_or(0, Vec::len);
                let start = usize::try_from(offset).map_err(|_| EINVAL)?.min(end);
                let bytes = vec![0; length.min(end - start)];
                self.change(Change::Write { device, offset, bytes });
            }
            RequestOp::Flush => self.change(Change::Flush { device }),
            RequestOp::NextData => {
                let found = self.find_data(device, offset..offset.saturating_add(request.length));
                (request.offset, request.length) = (found.start, found.end - found.start);
            }
            RequestOp::Length => request.length = self.files.get(&device).map_or(0, |file| file.len() as u64),
            RequestOp::SetLength if self.rules.is_fixed(device) => {}
            RequestOp::SetLength => self.change(Change::SetLength { device, length: offset }),
        }
        Ok(())
    }
}

impl BlockIo for MemoryDevices {
    fn submit(&mut self, requests: &mut [Request]) -> Result<(), IoFailure> {
        self.submits += 1;
        for (index, request) in requests.iter_mut().enumerate() {
            self.rules.check(request, &self.log);
            let result = if self.fail_at == Some(self.executed) { Err(EIO) } else { self.execute(request) };
            self.executed += 1;
            if let Err(errno) = result {
                request.status = i32::try_from(errno).unwrap_or(i32::MAX);
                return Err(IoFailure { index, errno });
            }
            request.status = request_status::OK;
        }
        Ok(())
    }

    fn heap_free(&self) -> usize {
        self.heap.unwrap_or(48 << 20)
    }

    fn enter(&mut self, phase: Phase) {
        self.rules.enter(phase, &self.log);
    }
}
