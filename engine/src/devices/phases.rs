//! The phases of an operation, and the devices that may change in each. The guest requests each phase. The code that serves
//! the guest decides how far it gets; these rules ensure that no device changes in the wrong phase.

use super::Devices;
use instar_guest_abi::{DeviceRole, Phase, Request, RequestOp, Situation, IDENTITY_RANGE};
use std::cell::Cell;

/// The present phase, and the used part of the grant to record a parent.
#[derive(Debug, Default)]
pub struct Phases {
    now: Phase,
    /// The device and the range of it in which a parent is recorded, once anything was.
    record: Cell<Option<(u32, u64)>>,
    /// Whether somebody waits for the word that the target is complete, and has got it.
    awaits_complete: bool,
    complete: bool,
}

impl Phases {
    /// The phase.
    pub(super) fn now(&self) -> Phase {
        self.now
    }
}

impl Devices {
    /// The phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phases.now
    }

    /// Enter a phase.
    ///
    /// # Errors
    /// One clause: it does not come next, or something is not durable that has to be.
    pub fn enter(&mut self, phase: Phase) -> Result<(), String> {
        if !self.phases.now.leads_to(phase) {
            return Err(format!("phase {} after phase {}", phase as u32, self.phases.now as u32));
        }
        if phase != Phase::Target && self.phases.awaits_complete && !self.phases.complete {
            return Err("another image is to be changed before the target is said to be complete".to_owned());
        }
        // What is changed later counts on what was changed before.
        let (of, later) = match phase {
            Phase::Overlay => ("target", "the overlay is to be changed"),
            Phase::Inspect | Phase::Target | Phase::Children => ("image", "another parent is to be recorded"),
        };
        if let Some(device) = self.unflushed(|role| phase == Phase::Children || role == DeviceRole::Target) {
            return Err(format!("{later} while device {device} of the {of} is not flushed"));
        }
        self.phases.now = phase;
        Ok(())
    }

    /// Block changes that depend on the target until it is [complete](Self::complete_target).
    pub fn await_complete(&mut self) {
        self.phases.awaits_complete = true;
    }

    /// Record that the target is complete: nothing changes it any more.
    pub fn complete_target(&mut self) {
        self.phases.complete = true;
    }

    /// Whether an operation that ends in phase `last` is done: the phase is reached, and everything is durable.
    ///
    /// # Errors
    /// What a success that is told now leaves out, in one clause.
    pub fn finished(&self, last: Option<Phase>) -> Result<(), String> {
        if last != Some(self.phases.now) {
            return Err("it reported success before its work was done".to_owned());
        }
        match self.unflushed(|_| true) {
            Some(device) => Err(format!("it reported success while device {device} is not flushed")),
            None => Ok(()),
        }
    }

    /// Return the first device of these parts with changes that no flush has made durable.
    pub fn unflushed(&self, of: impl Fn(DeviceRole) -> bool) -> Option<u32> {
        let mut devices = (0..).zip(&self.slots);
        let found = devices.find(|(_, slot)| slot.as_ref().is_some_and(|device| device.dirty && of(device.role)));
        found.map(|(number, _)| number)
    }

    /// Whether a request may change its device now.
    ///
    /// # Errors
    /// What is wrong with it, in one clause.
    pub(super) fn check_phase(&self, role: DeviceRole, op: RequestOp, request: &Request) -> Result<(), &'static str> {
        let above = !matches!(role, DeviceRole::Target | DeviceRole::Rebased) && self.phases.now == Phase::Target;
        let record = self.phases.record.get().and_then(|(device, _)| self.device(device));
        let now = Situation {
            phase: self.phases.now,
            target_unflushed: self.unflushed(|role| role == DeviceRole::Target).is_some(),
            record_unflushed: record.is_some_and(|device| device.dirty),
            is_record: above && op == RequestOp::Write && self.records(request),
        };
        if role == DeviceRole::Target && self.phases.complete {
            return Err("a change of the target after it was said to be complete");
        }
        let begun = || self.slots.iter().flatten().any(|device| device.role == DeviceRole::Target && device.changed);
        if role != DeviceRole::Target && self.phases.awaits_complete && !self.phases.complete && begun() {
            return Err("a change of another image before the target is said to be complete");
        }
        role.refusal(now).map_or(Ok(()), Err)
    }

    /// Whether a write lies where the one record of a parent may be. Asked again of the same request, it says the same.
    fn records(&self, request: &Request) -> bool {
        let range = request.offset / IDENTITY_RANGE;
        let last = request.offset.saturating_add(request.length.saturating_sub(1)) / IDENTITY_RANGE;
        let record = self.phases.record.get().unwrap_or((request.device, range));
        let inside = range == last && record == (request.device, range);
        if inside {
            self.phases.record.set(Some(record));
        }
        inside
    }
}
