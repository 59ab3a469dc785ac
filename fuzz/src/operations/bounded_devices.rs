//! Devices in memory, which keep the host's rules, with a bound on what is moved: a request that would end the guest is a finding,
//! since no image may bring a driver to make one.

use instar_guest_abi::{DeviceConfig, DeviceRole, Phase, Request, RequestOp};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{BlockIo, IoFailure};
use std::collections::BTreeMap;

/// Bytes that one image may keep in memory while it is committed, a good deal more than guest memory.
const MAX_LOG: u64 = 256 << 20;

/// Requests, and bytes that are read, of an operation on images of a MiB: more is a stall.
const MAX_REQUESTS: usize = 200_000;
const MAX_READ: u64 = 256 << 20;

/// The devices of an operation.
pub struct BoundedDevices {
    /// The devices.
    pub devices: MemoryDevices,
    moved: u64,
    /// Requests that may be made, if there is a bound.
    most: Option<usize>,
}

impl BoundedDevices {
    /// The devices of a commit of `overlay` into `target`; all others are only read. If the overlay is kept, `kept` is the lowest
    /// layer that is merged: what it records of its parent may change.
    pub fn commit(
        files: BTreeMap<u32, Vec<u8>>,
        overlay: &DeviceConfig,
        kept: Option<&DeviceConfig>,
        target: &DeviceConfig,
    ) -> Self {
        let mut devices = MemoryDevices::new(files);
        match kept {
            None => devices.hold_commit(overlay, false, target),
            Some(lowest) => devices
                .hold([(DeviceRole::Overlay { emptied: false, identity: true }, lowest), (DeviceRole::Target, target)]),
        }
        Self { devices, moved: 0, most: None }
    }

    /// Devices that are only read: without a plan, nothing else is possible.
    pub fn look(files: BTreeMap<u32, Vec<u8>>) -> Self {
        Self { devices: MemoryDevices::new(files), moved: 0, most: None }
    }

    /// The same with a bound on the work: an operation on images of a MiB that asks for more stalls.
    pub fn bounded(self) -> Self {
        Self { most: Some(MAX_REQUESTS), ..self }
    }

    /// Each change is kept for the crash tests' sake: that has a bound.
    fn count(&mut self, request: &Request) {
        let file = self.devices.files.get(&request.device).map_or(0, Vec::len) as u64;
        self.moved += match RequestOp::from_u32(request.op) {
            Some(RequestOp::Write | RequestOp::Copy) => request.length,
            Some(RequestOp::Zero) => request.length.min(file),
            _ => 0,
        };
        assert!(self.moved <= MAX_LOG, "{} bytes were moved: {request:?}", self.moved);
    }
}

impl BlockIo for BoundedDevices {
    fn submit(&mut self, requests: &mut [Request]) -> Result<(), IoFailure> {
        requests.iter().for_each(|request| self.count(request));
        if self.most.is_some_and(|most| self.devices.executed() > most || self.devices.bytes_read > MAX_READ) {
            panic!("a stall: {} requests, {} bytes read", self.devices.executed(), self.devices.bytes_read);
        }
        self.devices.submit(requests)
    }

    fn heap_free(&self) -> usize {
        self.devices.heap_free()
    }

    fn enter(&mut self, phase: Phase) {
        self.devices.enter(phase);
    }
}
