//! The host's rules for a guest, applied to devices in memory: a request that would end the guest fails the test.

use crate::change::Change;
use alloc::collections::BTreeMap;
use instar_guest_abi::{
    device_flags, request_flags, DeviceConfig, DeviceRole, Phase, Request, RequestOp, Situation, DEVICE_OUTPUT,
    GUEST_MEMORY_SIZE, IDENTITY_RANGE,
};

/// The limits of a device.
#[derive(Clone, Copy, Debug)]
struct Held {
    role: DeviceRole,
    /// Maximum length in bytes.
    longest: u64,
    /// Length in bytes, if it cannot change.
    fixed: Option<u64>,
}

/// The rules, and the phase of the operation.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    phase: Phase,
    held: BTreeMap<u32, Held>,
    /// The device and range in which a parent was recorded.
    record: Option<(u32, u64)>,
}

/// The images of an operation, before they are described: device 0 is an overlay that is emptied, the output device what it
/// is committed into, and the rest is read.
fn usual(device: u32) -> Held {
    let role = match device {
        0 => DeviceRole::Overlay { emptied: true, identity: true },
        DEVICE_OUTPUT => DeviceRole::Target,
        _ => DeviceRole::Read,
    };
    Held { role, longest: i64::MAX.cast_unsigned(), fixed: None }
}

impl Rules {
    /// Begin an operation on these images and their other files; all other devices are read-only.
    pub fn of<'a>(images: impl IntoIterator<Item = (DeviceRole, &'a DeviceConfig)>) -> Self {
        let mut held = BTreeMap::new();
        let mut add = |role, device, flags: u32, length: u64, longest: u64| {
            let fixed = (flags & device_flags::FIXED_LENGTH != 0).then_some(length);
            held.insert(device, Held { role, longest: fixed.unwrap_or(longest.max(length)), fixed });
        };
        for (role, image) in images {
            add(role, image.device, image.flags, image.file_length, image.max_length);
            for file in image.files.as_slice() {
                add(role, file.device, file.flags, file.file_length, file.max_length);
            }
        }
        Self { held, ..Self::default() }
    }

    fn of_device(&self, device: u32) -> Held {
        let none = Held { role: DeviceRole::Read, longest: 0, fixed: None };
        match self.held.get(&device) {
            Some(held) => *held,
            None if self.held.is_empty() => usual(device),
            None => none,
        }
    }

    /// Whether the device keeps its length.
    pub fn is_fixed(&self, device: u32) -> bool {
        self.of_device(device).fixed.is_some()
    }

    /// Enter a phase; `log` holds the changes so far.
    pub fn enter(&mut self, phase: Phase, log: &[Change]) {
        assert!(self.phase.leads_to(phase), "phase {phase:?} after {:?}", self.phase);
        if matches!(phase, Phase::Overlay | Phase::Children) {
            let changed = self.held.keys().filter(|_| phase == Phase::Children).copied();
            let dirty = changed.chain(self.targets()).find(|&device| unflushed(log, device));
            assert!(dirty.is_none(), "phase {phase:?} while device {dirty:?} is not flushed");
        }
        self.phase = phase;
    }

    /// The devices of the target.
    fn targets(&self) -> impl Iterator<Item = u32> + '_ {
        let usual = self.held.is_empty().then_some(DEVICE_OUTPUT);
        let known = self
            .held
            .iter()
            .filter(|(_, held)| matches!(held.role, DeviceRole::Target | DeviceRole::Rebased))
            .map(|(device, _)| *device);
        known.chain(usual)
    }

    /// Check a request against the rules; `log` holds the changes so far.
    pub fn check(&mut self, request: &Request, log: &[Change]) {
        let op = RequestOp::from_u32(request.op);
        let Some(op) = op else { unreachable!("an operation that does not exist: {request:?}") };
        let allowed = if op == RequestOp::Zero { request_flags::DISCARD } else { 0 };
        assert!(request.flags & !allowed == 0, "flags that do not exist: {request:?}");
        let end_of = |offset: u64| offset.checked_add(request.length).filter(|&end| i64::try_from(end).is_ok());
        let end = end_of(request.offset);
        let Some(end) = end else { unreachable!("a range that overflows: {request:?}") };
        if matches!(op, RequestOp::Read | RequestOp::Write) {
            let there = request.buffer != 0 && request.buffer.checked_add(request.length).is_some();
            assert!(there && request.length <= GUEST_MEMORY_SIZE, "a buffer outside the heap: {request:?}");
        }
        if op == RequestOp::Copy {
            let source_end = end_of(request.src_offset);
            let Some(source_end) = source_end else { unreachable!("a source range that overflows: {request:?}") };
            let apart = request.src_offset >= end || request.offset >= source_end;
            assert!(request.src_device != request.device || apart, "ranges that overlap: {request:?}");
        }
        if matches!(op, RequestOp::Read | RequestOp::Flush | RequestOp::NextData | RequestOp::Length) {
            return;
        }
        let held = self.of_device(request.device);
        self.check_phase(held.role, op, request, log);
        let grows = matches!(op, RequestOp::Write | RequestOp::Copy | RequestOp::SetLength);
        assert!(!grows || end <= held.longest, "more than the {} bytes that it may have: {request:?}", held.longest);
    }

    fn check_phase(&mut self, role: DeviceRole, op: RequestOp, request: &Request, log: &[Change]) {
        let range = request.offset / IDENTITY_RANGE;
        let last = request.offset.saturating_add(request.length.saturating_sub(1)) / IDENTITY_RANGE;
        let place = (request.device, range);
        let now = Situation {
            phase: self.phase,
            target_unflushed: self.targets().any(|device| unflushed(log, device)),
            record_unflushed: self.record.is_some_and(|(device, _)| unflushed(log, device)),
            is_record: op == RequestOp::Write && range == last && self.record.unwrap_or(place) == place,
        };
        if let Some(why) = role.refusal(now) {
            unreachable!("{why}: {request:?}");
        }
        if self.phase == Phase::Target && !matches!(role, DeviceRole::Target | DeviceRole::Rebased) {
            self.record = Some(place);
        }
    }
}

/// Whether a device has changes that no flush has made durable.
fn unflushed(log: &[Change], device: u32) -> bool {
    let last = log.iter().rev().find(|change| change.device() == device);
    last.is_some_and(|change| !matches!(change, Change::Flush { .. }))
}
