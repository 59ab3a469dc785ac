//! The host's answers to the guest of a resize: it checks the plan, the phases, and the end.

use crate::bytes::Bytes;
use crate::devices::Devices;
use crate::operation::GuestFailure;
use crate::operation::{decode, enter_planned, Events, Meter, PlanNeeds, Room};
use crate::sandbox::BadRequest;
use instar_guest_abi::{ErrorCode, Phase};
use instar_guest_protocol::resize::{Outcome, Plan};

/// The reports of a resize's guest, and its permissions.
#[derive(Default)]
pub struct ResizeEvents {
    /// The progress, if an observer asks for it.
    pub(super) meter: Option<Meter>,
    /// Bytes of the disk that are preallocated.
    pub(super) filled: u64,
    /// The guest's plan, once it has reported it.
    pub plan: Option<Plan>,
    /// The final virtual size in bytes, once the guest has reported it.
    pub virtual_size: u64,
    /// The present and the requested virtual size in bytes.
    pub sizes: (u64, u64),
    /// The maximum length of all the image's files together, in bytes.
    pub longest: u64,
    /// The room in the file system, if the new part of the disk takes some.
    pub(super) room: Room,
    /// Minimum of bytes that it takes of the file, in a format without clusters.
    pub(super) least: u64,
    /// The device whose file gets the new part of the disk, if that takes space, and the present length of all files, in bytes.
    pub(super) reserves: Option<(u32, u64)>,
    /// Why the file system did not reserve that space.
    pub(super) unreserved: Option<GuestFailure>,
    /// Whether nothing may change.
    pub dry_run: bool,
}

impl ResizeEvents {
    /// Take the guest's plan: every check that can refuse has passed, and the first change comes next.
    fn planned(&mut self, plan: Plan) -> Result<(), BadRequest> {
        if self.plan.is_some() {
            return Err(BadRequest("a second plan".to_owned()));
        }
        let (old, wanted) = self.sizes;
        // A format may round up, but not so far that the disk would not change.
        let right = if wanted < old { plan.new_size < old } else { (plan.new_size == old) == (wanted == old) };
        if plan.old_size != old || plan.new_size < wanted || !right {
            let Plan { old_size, new_size, .. } = plan;
            return Err(BadRequest(format!("a plan from {old_size} to {new_size} bytes, not from {old} to {wanted}")));
        }
        if plan.final_length > self.longest {
            return Err(BadRequest(format!(
                "a plan that makes the image {} bytes long, where {} are allowed",
                plan.final_length, self.longest
            )));
        }
        let needs = PlanNeeds {
            data_clusters: plan.new_data_clusters.max(self.least),
            metadata_clusters: plan.new_metadata_clusters,
            encoded_bytes: 0,
            final_length: plan.final_length,
        };
        self.room.admit(&needs)?;
        self.meter.iter().for_each(|meter| meter.planned(self.filled));
        self.plan = Some(plan);
        Ok(())
    }

    /// Have the file system reserve what the plan may need, before the first change: a disk that runs full later would leave
    /// an image of the new size that was not closed. The length of the file, and all of its bytes, stay as they are.
    fn reserve(&mut self, devices: &Devices) -> Result<(), BadRequest> {
        let (Some((device, length)), Some(plan)) = (self.reserves, &self.plan) else { return Ok(()) };
        let bytes = plan.final_length.saturating_sub(length);
        devices.reserve_behind(device, bytes).map_err(|error| {
            let text = format!("what is new of the disk needs {} more of the file system", Bytes(bytes));
            self.unreserved = Some(GuestFailure {
                device: Some(device),
                errno: error.raw_os_error().unwrap_or(0).unsigned_abs(),
                ..GuestFailure::ended(ErrorCode::NoSpace, text)
            });
            BadRequest("the space is not there".to_owned())
        })
    }

    /// The phase in which the guest has to end.
    fn last_phase(&self) -> Phase {
        if self.dry_run || self.sizes.0 == self.sizes.1 {
            Phase::Inspect
        } else {
            Phase::Target
        }
    }
}

impl Events for ResizeEvents {
    fn meter(&self) -> Option<&Meter> {
        self.meter.as_ref()
    }

    fn event(&mut self, _: &mut Devices, event: &[u8]) -> Result<(), BadRequest> {
        self.planned(decode(event)?)
    }

    fn enter(&mut self, devices: &mut Devices, phase: Phase) -> Result<(), BadRequest> {
        enter_planned(devices, phase, self.plan.as_ref(), self.last_phase())?;
        self.reserve(devices)
    }

    /// Accept a success only if it equals the plan, and the devices confirm it.
    fn succeeded(&mut self, devices: &mut Devices, result: &[u8]) -> Result<(), BadRequest> {
        let Outcome { virtual_size } = decode(result)?;
        let planned = self.plan.as_ref().map(|plan| plan.new_size);
        if planned != Some(virtual_size) {
            return Err(BadRequest(format!("an image of {virtual_size} bytes, which was not planned")));
        }
        self.virtual_size = virtual_size;
        devices.finished(Some(self.last_phase())).map_err(BadRequest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Device;
    use crate::operation::test_buffers::Zeroes;
    use crate::operation::{Cancel, Handler};
    use crate::sandbox::Host;
    use instar_guest_abi::{DeviceRole, Request, DEVICE_OUTPUT};
    use instar_guest_protocol::end_message::Outcome as End;
    use instar_guest_protocol::guest_message::Kind;
    use instar_guest_protocol::{EndMessage, Message, PhaseMessage};

    /// An image of `sizes.0` bytes that is to have `sizes.1`; its file has 4096, and may have twice as many.
    fn handler(sizes: (u64, u64), dry_run: bool) -> Handler<ResizeEvents> {
        let mut devices = Devices::new();
        let file = tempfile::tempfile().unwrap_or_else(|error| unreachable!("{error}"));
        let _ = file.set_len(4096);
        devices.attach(DEVICE_OUTPUT, Device::new(file, true, 4096, 8192, false).with_role(DeviceRole::Target));
        let events = ResizeEvents { sizes, longest: 8192, dry_run, ..ResizeEvents::default() };
        Handler::new(devices, events, Cancel::new())
    }

    fn plan(old_size: u64, new_size: u64, final_length: u64) -> Kind {
        Kind::Event(Plan { old_size, new_size, final_length, ..Plan::default() }.encode_to_vec())
    }

    fn target() -> Kind {
        Kind::Phase(PhaseMessage { phase: Phase::Target as u32 })
    }

    fn done(virtual_size: u64) -> Kind {
        let result = Outcome { virtual_size }.encode_to_vec();
        Kind::End(EndMessage { outcome: Some(End::Result(result)) })
    }

    fn write() -> Request {
        Request::write(DEVICE_OUTPUT, 0, 0, 512)
    }

    impl Handler<ResizeEvents> {
        fn tell(&mut self, message: Kind) -> String {
            self.message(message).map_or_else(|bad| bad.0, |()| String::new())
        }

        fn ask(&mut self, request: Request) -> String {
            self.requests(&Zeroes, &mut [request]).map_or_else(|bad| bad.0, |()| String::new())
        }
    }

    #[test]
    fn a_resize_goes_from_its_plan_to_what_is_durable() {
        let mut handler = handler((1024, 2048), false);
        assert!(handler.ask(write()).contains("before a plan was accepted"));
        let mut handler = super::tests::handler((1024, 2048), false);
        assert!(handler.tell(target()).contains("before a plan"));
        assert_eq!(handler.tell(plan(1024, 2048, 8192)) + &handler.tell(target()) + &handler.ask(write()), "");
        assert!(handler.tell(done(2048)).contains("not flushed"));
        assert_eq!(handler.ask(Request::flush(DEVICE_OUTPUT)) + &handler.tell(done(2048)), "");
        assert_eq!(handler.events.virtual_size, 2048);
    }

    #[test]
    fn a_plan_is_what_was_asked_for() {
        let told = |sizes, plan| handler(sizes, false).tell(plan);
        assert_eq!(told((1024, 2048), plan(1024, 4096, 0)), "", "a format may round up");
        assert!(told((1024, 2048), plan(1024, 1536, 0)).contains("a plan from"), "too small");
        assert!(told((1024, 2048), plan(512, 2048, 0)).contains("a plan from"), "of another image");
        assert!(told((2048, 1024), plan(2048, 2048, 0)).contains("a plan from"), "it does not shrink");
        assert!(told((1024, 1024), plan(1024, 2048, 0)).contains("a plan from"), "it was not to grow");
        assert!(told((1024, 2048), plan(1024, 2048, 8193)).contains("are allowed"));
        let mut twice = handler((1024, 2048), false);
        assert_eq!(twice.tell(plan(1024, 2048, 0)), "");
        assert!(twice.tell(plan(1024, 2048, 0)).contains("second plan"));
        assert!(twice.tell(done(2048)).contains("before its work was done"));
        let mut other = handler((1024, 2048), true);
        assert_eq!(other.tell(plan(1024, 2048, 0)), "");
        assert!(other.tell(done(1024)).contains("not planned"));
    }

    #[test]
    fn nothing_is_changed_in_a_dry_run_or_for_the_same_size() {
        for (sizes, dry_run) in [((1024, 2048), true), ((1024, 1024), false)] {
            let mut handler = handler(sizes, dry_run);
            assert_eq!(handler.tell(plan(1024, sizes.1, 0)), "");
            assert!(handler.tell(target()).contains("nothing may be changed"));
            assert!(handler.ask(write()).contains("before a plan was accepted"));
            assert_eq!(handler.tell(done(sizes.1)), "");
        }
    }
}
