//! The host's answers to the guest of a rebase: it checks the plan, the phases, and the end.

use crate::commit::REPLACED_MARK;
use crate::create::look_like;
use crate::devices::{Cache, Devices};
use crate::error::{reason, Error};
use crate::operation::{decode, DevicePaths, Events, Meter, Observer, PlanNeeds, Room, Session};
use crate::sandbox::BadRequest;
use instar_guest_abi::{Phase, DEVICE_OUTPUT, PARENT_ROOM};
use instar_guest_protocol::rebase::{Outcome, Plan};
use rustix::fs::{fsetxattr, fsync, XattrFlags};
use rustix::io::{retry_on_intr, Errno};
use std::ffi::CStr;
use std::rc::Rc;

/// Whom an image looks like before it gets another parent: it has owner, mode and extended attributes of another one then.
#[derive(Clone, Debug)]
pub struct Likeness {
    /// The device of the other image.
    pub device: u32,
    /// The extended attribute that the image gets at the same time, where its file system has any, and the value. That of the other
    /// image stays behind.
    pub mark: (&'static CStr, Vec<u8>),
}

/// The reports of a rebase's guest, and its permissions.
#[derive(Default)]
pub struct RebaseEvents {
    /// The result, once the guest has reported it.
    pub outcome: Outcome,
    /// The guest's plan, once it has reported it.
    pub plan: Option<Plan>,
    /// The progress, if an observer asks for it.
    pub(crate) meter: Option<Meter>,
    /// Warnings to print once nothing can refuse the rebase any more.
    pub(crate) warnings: Vec<String>,
    /// Whether a commit from the image was interrupted, so that nothing can be written into it before it gets another
    /// parent.
    pub(crate) only_record: bool,
    /// Whether data would have to be written nevertheless, for which the host ended the guest.
    pub(crate) needs_data: bool,
    /// Length in bytes of an image on a device, which cannot grow.
    pub(crate) fixed: Option<u64>,
    /// Whether the device has no room for the data and the new name, for which the host ended the guest.
    pub(crate) lacks_room: bool,
    /// Whether the observer did not agree to the first change, for which the host ended the guest.
    pub(crate) held_back: bool,
    /// The observer that is told the warnings, and asked.
    pub(crate) observer: Option<Rc<dyn Observer>>,
    /// The room in its file system.
    pub(crate) room: Room,
    /// The image that it has to look like.
    pub(crate) likeness: Option<Likeness>,
    /// The reason why it cannot have them, for which the host ended the guest.
    pub(crate) unlike: Option<String>,
    /// Whether nothing may change.
    pub(crate) dry_run: bool,
    /// Virtual size of the image in bytes: no more can be written.
    pub(crate) virtual_size: u64,
}

impl RebaseEvents {
    /// Attach these events to devices whose image has files of `length` bytes together.
    ///
    /// # Errors
    /// [`ErrorCode::OpenFailed`](instar_guest_abi::ErrorCode::OpenFailed) for a file system that knows no direct I/O.
    pub(crate) fn serve(
        self,
        devices: &mut Devices,
        paths: &DevicePaths,
        session: &Session,
        (cache, length): (Cache, u64),
    ) -> Result<Self, Error> {
        paths.set_cache(devices, cache)?;
        let meter = Meter::attend(devices, paths, session, cache, length);
        Ok(Self { meter: Some(meter), observer: Some(session.observer().clone()), ..self })
    }

    /// Give the image the [likeness](Self::likeness) of another, durably.
    fn look_like(&mut self, devices: &Devices) -> Result<(), BadRequest> {
        let Some(Likeness { device, mark: (mark, value) }) = &self.likeness else { return Ok(()) };
        let Some(other) = devices.device(*device) else { return Ok(()) };
        let Some(image) = devices.device(DEVICE_OUTPUT) else { return Ok(()) };
        let flush =
            |()| retry_on_intr(|| fsync(image.file())).map_err(|errno| format!("it cannot be flushed: {errno}"));
        let marked = |()| match fsetxattr(image.file(), *mark, value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(errno) => Err(format!("it cannot be marked: {}", reason(&errno.into()))),
        };
        let likeness = look_like(other.file(), image.file(), &[REPLACED_MARK, mark]);
        self.unlike = likeness.and_then(marked).and_then(flush).err();
        match self.unlike {
            Some(_) => Err(BadRequest("an image that cannot look like another".to_owned())),
            None => Ok(()),
        }
    }
}

impl Events for RebaseEvents {
    fn meter(&self) -> Option<&Meter> {
        self.meter.as_ref()
    }

    /// Take the guest's plan: every check that can refuse has passed, and the first change comes next.
    fn event(&mut self, _: &mut Devices, event: &[u8]) -> Result<(), BadRequest> {
        let plan: Plan = decode(event)?;
        if self.plan.is_some() {
            return Err(BadRequest("a second plan".to_owned()));
        }
        if plan.bytes > self.virtual_size {
            let (bytes, size) = (plan.bytes, self.virtual_size);
            return Err(BadRequest(format!("a plan to write {bytes} bytes into an image of {size}")));
        }
        self.meter.iter().for_each(|meter| meter.planned(plan.bytes));
        self.plan = Some(plan);
        self.needs_data = self.only_record && plan.bytes > 0;
        if self.needs_data {
            return Err(BadRequest("data for an image that only gets another parent".to_owned()));
        }
        // If the data took the room of the name, no run could finish the rebase.
        let end = plan.final_length.saturating_add(PARENT_ROOM);
        self.lacks_room = plan.bytes > 0 && self.fixed.is_some_and(|length| end > length);
        if self.lacks_room {
            return Err(BadRequest("data that leaves no room for a name".to_owned()));
        }
        let needs = PlanNeeds {
            data_clusters: plan.new_data_clusters,
            metadata_clusters: plan.new_metadata_clusters,
            encoded_bytes: 0,
            final_length: plan.final_length,
        };
        self.room.admit(&needs)?;
        self.held_back = !self.dry_run && self.observer.as_ref().is_some_and(|observer| !observer.agrees(plan.bytes));
        if self.held_back {
            return Err(BadRequest("a change that the caller does not want".to_owned()));
        }
        for line in &self.warnings {
            self.observer.iter().for_each(|observer| observer.warning(line));
        }
        Ok(())
    }

    fn enter(&mut self, devices: &mut Devices, phase: Phase) -> Result<(), BadRequest> {
        match phase {
            _ if self.plan.is_none() => Err(BadRequest("a change was announced before a plan".to_owned())),
            _ if self.dry_run => Err(BadRequest("a change was announced in a dry run".to_owned())),
            Phase::Target => devices.enter(phase).map_err(BadRequest),
            Phase::Children => {
                self.look_like(devices)?;
                devices.enter(phase).map_err(BadRequest)
            }
            Phase::Inspect | Phase::Overlay => {
                Err(BadRequest("a change that no rebase makes was announced".to_owned()))
            }
        }
    }

    /// Accept a success only if the devices confirm it.
    fn succeeded(&mut self, devices: &mut Devices, result: &[u8]) -> Result<(), BadRequest> {
        self.outcome = decode(result)?;
        let last = if self.dry_run { Phase::Inspect } else { Phase::Children };
        devices.finished(self.plan.is_some().then_some(last)).map_err(BadRequest)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
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

    fn handler(dry_run: bool) -> Handler<RebaseEvents> {
        let mut devices = Devices::new();
        for (number, role) in [(0, DeviceRole::Read), (DEVICE_OUTPUT, DeviceRole::Rebased)] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(8192).unwrap();
            devices.attach(number, Device::new(file, role != DeviceRole::Read, 8192, 8192, false).with_role(role));
        }
        let events = RebaseEvents { dry_run, virtual_size: 1000, ..RebaseEvents::default() };
        Handler::new(devices, events, Cancel::new())
    }

    fn phase(phase: Phase) -> Kind {
        Kind::Phase(PhaseMessage { phase: phase as u32 })
    }

    fn plan(bytes: u64) -> Kind {
        Kind::Event(Plan { bytes, ..Plan::default() }.encode_to_vec())
    }

    fn done() -> Kind {
        Kind::End(EndMessage { outcome: Some(End::Result(Outcome::default().encode_to_vec())) })
    }

    impl Handler<RebaseEvents> {
        fn ask(&mut self, request: Request) -> String {
            self.requests(&Zeroes, &mut [request]).map_or_else(|bad| bad.0, |()| String::new())
        }

        fn tell(&mut self, message: Kind) -> String {
            self.message(message).map_or_else(|bad| bad.0, |()| String::new())
        }
    }

    const WRITE: Request = Request::write(DEVICE_OUTPUT, 0, 0, 512);

    #[test]
    fn a_parent_is_named_once_the_data_are_durable() {
        let mut handler = handler(false);
        assert!(handler.ask(WRITE).contains("before a plan was accepted"));
        assert!(handler.tell(phase(Phase::Target)).contains("before a plan"));
        assert_eq!(handler.tell(plan(1000)) + &handler.tell(phase(Phase::Target)) + &handler.ask(WRITE), "");
        assert!(handler.tell(phase(Phase::Children)).contains("not flushed"));
        assert!(handler.tell(phase(Phase::Overlay)).contains("no rebase makes"));
        assert_eq!(handler.ask(Request::flush(DEVICE_OUTPUT)), "");
        assert!(handler.tell(done()).contains("before its work"));
        assert_eq!(handler.tell(phase(Phase::Children)) + &handler.ask(WRITE), "");
        assert!(handler.tell(done()).contains("not flushed"));
        assert_eq!(handler.ask(Request::flush(DEVICE_OUTPUT)) + &handler.tell(done()), "");
    }

    #[test]
    fn what_is_below_is_only_read() {
        let mut handler = handler(false);
        assert_eq!(handler.tell(plan(0)) + &handler.tell(phase(Phase::Target)), "");
        assert!(handler.ask(Request::write(0, 0, 0, 512)).contains("read-only"));
    }

    #[test]
    fn a_dry_run_changes_nothing() {
        let mut handler = handler(true);
        assert_eq!(handler.tell(plan(1)), "");
        assert!(handler.tell(phase(Phase::Target)).contains("dry run"));
        assert!(handler.ask(WRITE).contains("before a plan was accepted"));
        assert_eq!(handler.tell(done()), "");
    }

    #[test]
    fn an_image_that_only_gets_another_parent_gets_no_data() {
        let planned = |bytes| {
            let mut handler = handler(false);
            handler.events.only_record = true;
            (handler.tell(plan(bytes)).is_empty(), handler.events.needs_data)
        };
        assert_eq!((planned(0), planned(512)), ((true, false), (false, true)));
    }

    #[test]
    fn nothing_is_changed_before_the_observer_agrees() {
        struct Asked(std::cell::Cell<u64>);
        impl Observer for Asked {
            fn agrees(&self, bytes: u64) -> bool {
                self.0.set(bytes);
                false
            }
        }
        let (mut handler, observer) = (handler(false), Rc::new(Asked(0.into())));
        handler.events.observer = Some(observer.clone());
        assert!(!handler.tell(plan(512)).is_empty());
        assert_eq!((handler.events.held_back, observer.0.get()), (true, 512));
    }

    #[test]
    fn a_plan_comes_once_and_is_no_larger_than_the_disk() {
        assert!(handler(false).tell(plan(1001)).contains("1001 bytes"));
        let mut twice = handler(false);
        assert_eq!(twice.tell(plan(1)), "");
        assert!(twice.tell(plan(1)).contains("second"));
    }
}
