//! Devices in memory that keep the host's rules: a request that would end the guest is a finding, since no image may bring a
//! driver to make one.

use instar_guest_abi::{request_flags, DeviceConfig, Request, RequestOp};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{BlockIo, IoFailure};
use std::collections::BTreeMap;

/// Bytes that one image may keep in memory while it is committed, a good deal more than guest memory.
const MAX_LOG: u64 = 256 << 20;

/// Requests, and bytes that are read, of an operation on images of a MiB: more is a stall.
const MAX_REQUESTS: usize = 200_000;
const MAX_READ: u64 = 256 << 20;

/// The devices of an operation, and what the host would let the guest do with each.
pub struct Strict {
    /// The devices.
    pub devices: MemoryDevices,
    /// Longest length in bytes by device; read-only ones are not there.
    writable: BTreeMap<u32, u64>,
    moved: u64,
    /// Requests that may be made, if there is a bound.
    most: Option<usize>,
}

impl Strict {
    /// The devices that these configurations describe; those in `writable` may be changed.
    pub fn new(files: BTreeMap<u32, Vec<u8>>, writable: &[&DeviceConfig]) -> Self {
        let writable = writable.iter().map(|config| (config.device, config.max_length.max(config.file_length)));
        Self { devices: MemoryDevices::new(files), writable: writable.collect(), moved: 0, most: None }
    }

    /// The same with a bound on the work: an operation on images of a MiB that asks for more stalls.
    pub fn bounded(files: BTreeMap<u32, Vec<u8>>, writable: &[&DeviceConfig]) -> Self {
        Self { most: Some(MAX_REQUESTS), ..Self::new(files, writable) }
    }

    fn check(&mut self, request: &Request) {
        let op = RequestOp::from_u32(request.op);
        let allowed = if op == Some(RequestOp::Zero) { request_flags::DISCARD } else { 0 };
        assert!(request.flags & !allowed == 0 && self.devices.files.contains_key(&request.device), "{request:?}");
        let in_range = |offset: u64| offset.checked_add(request.length).filter(|&end| i64::try_from(end).is_ok());
        let end = in_range(request.offset).unwrap_or_else(|| panic!("a range that overflows: {request:?}"));
        if matches!(op, Some(RequestOp::Read | RequestOp::Flush | RequestOp::NextData)) {
            return;
        }
        let longest = self.writable.get(&request.device).copied();
        let longest = longest.unwrap_or_else(|| panic!("a change of a device that is read-only: {request:?}"));
        if op == Some(RequestOp::Copy) {
            let source_end = in_range(request.src_offset).unwrap_or_else(|| panic!("a source range: {request:?}"));
            assert!(self.devices.files.contains_key(&request.src_device), "{request:?}");
            let apart = request.src_offset >= end || request.offset >= source_end;
            assert!(request.src_device != request.device || apart, "ranges that overlap: {request:?}");
        }
        assert!(op == Some(RequestOp::Zero) || end <= longest, "more than {longest}: {request:?}");
        // Each change is kept for the crash tests' sake: that has a bound, too.
        if op != Some(RequestOp::SetLength) {
            let file = self.devices.files.get(&request.device).map_or(0, Vec::len) as u64;
            self.moved += if op == Some(RequestOp::Zero) { request.length.min(file) } else { request.length };
        }
        assert!(self.moved <= MAX_LOG, "{} bytes were moved: {request:?}", self.moved);
    }
}

impl BlockIo for Strict {
    fn submit(&mut self, requests: &mut [Request]) -> Result<(), IoFailure> {
        requests.iter().for_each(|request| self.check(request));
        if self.most.is_some_and(|most| self.devices.executed() > most || self.devices.bytes_read > MAX_READ) {
            panic!("a stall: {} requests, {} bytes read", self.devices.executed(), self.devices.bytes_read);
        }
        self.devices.submit(requests)
    }

    fn heap_free(&self) -> usize {
        self.devices.heap_free()
    }
}
