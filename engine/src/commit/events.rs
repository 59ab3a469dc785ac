//! The host's answers to the guest of a commit: it checks the plan, the phases, and the end.

use super::atomic::Atomic;
use super::bitmaps::MergedBitmap;
use super::digest::Digests;
use super::meter::Meter;
use super::plan::PlanBounds;
use super::repeated::Repeated;
use super::snapshot::Snapshot;
use super::verify::Verification;
use crate::devices::Devices;
use crate::operation::{decode, Events, Needs, Observer, Space};
use crate::sandbox::{BadRequest, BufferAccess};
use instar_guest_abi::{request_status, Phase, Request, RequestOp};
use instar_guest_protocol::commit::event::Kind as Told;
use instar_guest_protocol::commit::{Bitmap, Event, Outcome, Plan, Verify};
use std::path::PathBuf;
use std::rc::Rc;

/// The reports of a commit's guest, and its permissions.
pub struct CommitEvents {
    /// The result of the commit, once the guest has reported it.
    pub outcome: Outcome,
    /// The guest's plan, once it has reported it.
    pub plan: Option<Plan>,
    /// The progress, if an observer asks for it.
    pub meter: Option<Meter>,
    /// The bitmaps of the committed layers, as the guest reports them, if the commit merges bitmaps.
    pub bitmaps: Option<Vec<MergedBitmap>>,
    /// Names of the overlay and the target, for lines about bitmaps.
    pub names: (PathBuf, PathBuf),
    /// Warnings to print once nothing can refuse the commit any more.
    pub warnings: Vec<String>,
    /// The observer that prints them.
    pub observer: Option<Rc<dyn Observer>>,
    /// The space that the backing has, as far as it is known.
    pub space: Option<Space>,
    /// The check for a backing that looks like an image of another format: only a repeated commit may go on.
    pub repeated: Option<Repeated>,
    /// The bytes that the plan needs and the bytes that are free, if a lack of space ended the guest.
    pub lacking: Option<(u64, u64)>,
    /// How far the guest may go: [`Phase::Look`] in a dry run, [`Phase::Target`] where the overlay is kept,
    /// [`Phase::Children`] where children of the overlay are to name the target.
    pub last_phase: Phase,
    /// Whether the overlay keeps its content.
    pub keep_overlay: bool,
    /// Whether other images are on the target, or on a layer between.
    pub has_siblings: bool,
    /// Whether the plan would change what they read, for which the host ended the guest.
    pub damages_siblings: bool,
    /// The bounds of its plan.
    pub bounds: PlanBounds,
    /// The progress of reading back, with `--verify`.
    pub verification: Option<Verification>,
    /// The digests of the disk, with `--digest`.
    pub digests: Option<Digests>,
    /// The state of `--atomic`, with which the target changes completely or not at all.
    pub atomic: Option<Atomic>,
}

impl Default for CommitEvents {
    /// Start with a guest that may only read.
    fn default() -> Self {
        Self {
            outcome: Outcome::default(),
            plan: None,
            meter: None,
            bitmaps: None,
            names: Default::default(),
            warnings: Vec::new(),
            observer: None,
            space: None,
            repeated: None,
            lacking: None,
            last_phase: Phase::Look,
            keep_overlay: false,
            has_siblings: false,
            damages_siblings: false,
            bounds: PlanBounds::default(),
            verification: None,
            digests: None,
            atomic: None,
        }
    }
}

/// The step in which the overlay is emptied, as the guest names it.
const EMPTYING: &str = "empty";
/// The step in which the target is written.
const WRITING: &str = "write";

impl CommitEvents {
    /// Take the report of a bitmap's fate. It comes before the plan, so that the observer learns of it before the first
    /// change.
    fn bitmap(&mut self, told: Bitmap) -> Result<(), BadRequest> {
        let bitmap = MergedBitmap::of(told).filter(|_| self.plan.is_none());
        let (Some(bitmap), Some(bitmaps)) = (bitmap, &mut self.bitmaps) else {
            return Err(BadRequest("a word about a bitmap that nobody asked for, or after the plan".to_owned()));
        };
        self.warnings.extend(bitmap.warning(&self.names.0, &self.names.1));
        bitmaps.push(bitmap);
        Ok(())
    }

    /// Take the guest's plan: every check that can refuse has passed, and the first change comes next.
    fn planned(&mut self, plan: Plan) -> Result<(), BadRequest> {
        if self.plan.is_some() {
            return Err(BadRequest("a second plan".to_owned()));
        }
        self.bounds.check(&plan).map_err(BadRequest)?;
        if self.digests.is_none() {
            self.meter.iter().for_each(|meter| meter.planned(plan.bytes));
        }
        self.plan = Some(plan);
        // An overlay that holds nothing changes nothing for them. Such an overlay is left, for example, by an
        // interrupted run that has already relinked some of them to the target.
        self.damages_siblings = self.has_siblings && plan.bytes > 0;
        if self.damages_siblings {
            return Err(BadRequest("a commit that damages other images on the target".to_owned()));
        }
        self.atomic.as_mut().map_or(Ok(()), |atomic| atomic.admit(plan.bytes))?;
        let needs = Needs {
            data_clusters: plan.new_data_clusters,
            metadata_clusters: plan.new_metadata_clusters,
            encoded_bytes: plan.encoded_bytes,
            final_length: plan.backing_final_length,
        };
        self.lacking = self.space.and_then(|space| space.lacking(&needs));
        if self.lacking.is_some() {
            return Err(BadRequest("more space than there is".to_owned()));
        }
        for warning in &self.warnings {
            self.observer.iter().for_each(|observer| observer.warning(warning));
        }
        Ok(())
    }
}

impl CommitEvents {
    /// Read back and compare the places that the guest names.
    fn read_back(&mut self, devices: &mut Devices, found: &Verify) -> Result<(), BadRequest> {
        let (Some(verification), Some(plan)) = (&mut self.verification, &self.plan) else {
            return Err(BadRequest("a target was read back that nobody asked for".to_owned()));
        };
        if verification.take(devices, found, plan.bytes)? {
            self.meter.iter().for_each(|meter| meter.reading_back(plan.bytes));
        }
        Ok(())
    }

    /// Take the beginning of a disk to hash.
    fn hash(&mut self, devices: &Devices, after: bool) -> Result<(), BadRequest> {
        let (Some(digests), Some(_)) = (&mut self.digests, &self.plan) else {
            return Err(BadRequest("a disk was hashed that nobody asked for".to_owned()));
        };
        self.meter.iter().for_each(|meter| meter.hashing(digests.length()));
        digests.begin(devices, after)
    }

    /// Whether everything that has to be read back was.
    fn check_read_back(&self) -> Result<(), BadRequest> {
        let planned = self.plan.as_ref().map_or(0, |plan| plan.bytes);
        self.verification.as_ref().map_or(Ok(()), |verification| verification.check_complete(planned))?;
        match (&self.digests, self.last_phase) {
            (None, _) => Ok(()),
            (Some(digests), Phase::Look) => digests.check_before(),
            (Some(digests), _) => digests.check_after(),
        }
    }
}

impl Events for CommitEvents {
    fn requests(
        &mut self,
        devices: &mut Devices,
        memory: &dyn BufferAccess,
        requests: &mut [Request],
    ) -> Result<(), BadRequest> {
        if let Some(digests) = self.digests.as_mut().filter(|_| requests.iter().any(Digests::concerns)) {
            return digests.take(devices, memory, requests);
        }
        match &mut self.repeated {
            None => devices.execute(memory, requests)?,
            // One after the other, and out of the guest's reach: the compared bytes have to be the written bytes.
            Some(repeated) => {
                for request in requests.iter_mut() {
                    let writes = request.op == RequestOp::Write as u32;
                    let copy = if writes { Snapshot::of(memory, request)? } else { None };
                    let memory = copy.as_ref().map_or(memory, |copy| copy);
                    if !repeated.allows(devices, memory, request) {
                        return Err(BadRequest("a change of the header of another format".to_owned()));
                    }
                    devices.execute(memory, std::slice::from_mut(request))?;
                    if request.status != request_status::OK {
                        break;
                    }
                }
            }
        }
        self.meter.iter().for_each(|meter| meter.settle(devices));
        Ok(())
    }

    fn event(&mut self, devices: &mut Devices, event: &[u8]) -> Result<(), BadRequest> {
        match decode::<Event>(event)?.kind {
            Some(Told::Plan(plan)) => self.planned(plan),
            Some(Told::Bitmap(bitmap)) => self.bitmap(bitmap),
            Some(Told::Complete(_)) => match &mut self.atomic {
                Some(_) => {
                    self.check_read_back()?;
                    self.atomic.as_mut().map_or(Ok(()), |atomic| atomic.complete(devices))
                }
                None => Err(BadRequest("a complete target was announced that nobody asked for".to_owned())),
            },
            Some(Told::Verify(found)) => self.read_back(devices, &found),
            Some(Told::Digest(begun)) => self.hash(devices, begun.after),
            None => Err(BadRequest("an event that says nothing".to_owned())),
        }
    }

    fn enter(&mut self, devices: &mut Devices, phase: Phase) -> Result<(), BadRequest> {
        if self.plan.is_none() {
            return Err(BadRequest("a change was announced before a plan".to_owned()));
        }
        let why = match (phase, self.last_phase) {
            (Phase::Target | Phase::Overlay | Phase::Children, Phase::Look) => "a change was announced in a dry run",
            (Phase::Overlay, _) if self.keep_overlay || self.last_phase < phase => {
                "a change of an overlay that is to keep its content was announced"
            }
            (Phase::Children, Phase::Target | Phase::Overlay) => "a change of children was announced that are to stay",
            (Phase::Children, _) if !self.keep_overlay && devices.phase() != Phase::Overlay => {
                "a change of children was announced before the overlay was emptied"
            }
            (Phase::Overlay | Phase::Children, _) => {
                self.check_read_back()?;
                return devices.enter(phase).map_err(BadRequest);
            }
            (Phase::Target, _) => {
                if let (Some(digests), Some(plan)) = (&self.digests, &self.plan) {
                    digests.check_before()?;
                    self.meter.iter().for_each(|meter| meter.planned(plan.bytes));
                }
                return devices.enter(phase).map_err(BadRequest);
            }
            _ => return devices.enter(phase).map_err(BadRequest),
        };
        Err(BadRequest(why.to_owned()))
    }

    fn step(&mut self, step: &str, done: u64) {
        match step {
            EMPTYING => self.meter.iter().for_each(Meter::emptying),
            WRITING => self.meter.iter().for_each(|meter| meter.written(done)),
            _ => {}
        }
    }

    /// Accept a success only if the devices confirm it.
    fn succeeded(&mut self, devices: &mut Devices, result: &[u8]) -> Result<(), BadRequest> {
        self.outcome = decode(result)?;
        self.check_read_back()?;
        let whole = self.last_phase == Phase::Look || self.atomic.as_ref().is_none_or(Atomic::is_complete);
        if !whole {
            return Err(BadRequest("it reported success and never said that the target is complete".to_owned()));
        }
        devices.finished(self.plan.is_some().then_some(self.last_phase)).map_err(BadRequest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Device;
    use crate::operation::{Cancel, Handler};
    use crate::sandbox::{Host, VolatileSlice};
    use instar_guest_abi::{Part, DEVICE_OUTPUT};
    use instar_guest_protocol::commit::Complete;
    use instar_guest_protocol::end_message::Outcome as End;
    use instar_guest_protocol::guest_message::Kind;
    use instar_guest_protocol::{EndMessage, FailureMessage, LogMessage, Message, PhaseMessage};

    const OVERLAY: u32 = 0;

    /// Ignores buffers: all written bytes are zeroes.
    struct Zeroes;

    impl BufferAccess for Zeroes {
        fn heap_slice(&self, _: u64, length: u64) -> Option<VolatileSlice<'_>> {
            let memory = vec![0_u8; usize::try_from(length).ok()?].leak();
            Some(VolatileSlice::from(memory))
        }
    }

    fn handler(last_phase: Phase) -> Handler<CommitEvents> {
        let mut devices = Devices::new();
        let parts = [(OVERLAY, Part::Overlay { emptied: true, identity: true }), (DEVICE_OUTPUT, Part::Target)];
        for (number, part) in parts {
            let file = tempfile::tempfile().unwrap_or_else(|error| unreachable!("{error}"));
            let _ = file.set_len(8192);
            devices.attach(number, Device::new(file, true, 8192, 8192, false).with_part(part));
        }
        let bounds = PlanBounds { virtual_size: 1000, longest: 8192, ..PlanBounds::default() };
        Handler::new(devices, CommitEvents { last_phase, bounds, ..CommitEvents::default() }, Cancel::new())
    }

    fn write(device: u32) -> Request {
        Request::write(device, 0, 0, 512)
    }

    fn phase(phase: Phase) -> Kind {
        Kind::Phase(PhaseMessage { phase: phase as u32 })
    }

    fn told(plan: Plan) -> Kind {
        Kind::Event(Event { kind: Some(Told::Plan(plan)) }.encode_to_vec())
    }

    fn plan() -> Kind {
        told(Plan::default())
    }

    fn done() -> Kind {
        Kind::End(EndMessage { outcome: Some(End::Result(Outcome::default().encode_to_vec())) })
    }

    impl Handler<CommitEvents> {
        fn ask(&mut self, request: Request) -> String {
            self.requests(&Zeroes, &mut [request]).map_or_else(|bad| bad.0, |()| String::new())
        }

        fn tell(&mut self, message: Kind) -> String {
            self.message(message).map_or_else(|bad| bad.0, |()| String::new())
        }
    }

    #[test]
    fn the_result_is_the_last_word() {
        let mut handler = Handler::new(Devices::new(), CommitEvents::default(), Cancel::new());
        let line = || Kind::Log(LogMessage { text: "a line".into() });
        assert_eq!(handler.tell(line()) + &handler.tell(plan()) + &handler.tell(done()), "");
        assert_eq!(handler.log.lines(), ["a line"]);
        assert!(handler.message(line()).is_err());
    }

    #[test]
    fn a_commit_goes_through_its_phases() {
        let mut handler = handler(Phase::Overlay);
        assert_eq!(handler.tell(plan()) + &handler.tell(phase(Phase::Target)), "");
        for request in [write(OVERLAY), Request::flush(OVERLAY), write(DEVICE_OUTPUT), Request::flush(DEVICE_OUTPUT)] {
            assert_eq!(handler.ask(request), "");
        }
        assert_eq!(handler.tell(phase(Phase::Overlay)), "");
        assert_eq!(handler.ask(write(OVERLAY)) + &handler.ask(Request::flush(OVERLAY)) + &handler.tell(done()), "");
    }

    #[test]
    fn nothing_is_changed_before_the_plan_or_in_a_dry_run() {
        for device in [OVERLAY, DEVICE_OUTPUT] {
            let mut early = handler(Phase::Overlay);
            assert!(early.ask(write(device)).contains("before a plan was accepted"));
            assert!(early.tell(phase(Phase::Target)).contains("before a plan"));
            assert_eq!(early.tell(plan()), "");
            assert!(early.ask(write(device)).contains("before a plan was accepted"), "announced, not entered");
            assert!(!early.devices.any_changed());
            let mut dry = handler(Phase::Look);
            assert_eq!(dry.tell(plan()), "");
            assert!(dry.tell(phase(Phase::Target)).contains("dry run"));
            assert!(dry.ask(write(device)).contains("before a plan was accepted"));
            assert_eq!(dry.tell(done()), "");
        }
    }

    #[test]
    fn the_overlay_is_changed_last_if_at_all() {
        let mut keep = handler(Phase::Target);
        assert_eq!(keep.tell(plan()) + &keep.tell(phase(Phase::Target)) + &keep.ask(write(DEVICE_OUTPUT)), "");
        assert!(keep.ask(write(OVERLAY)).contains("no record of its parent"), "not after the target was changed");
        assert!(keep.tell(phase(Phase::Overlay)).contains("keep its content"));
        let mut late = handler(Phase::Overlay);
        assert_eq!(late.tell(plan()) + &late.tell(phase(Phase::Target)) + &late.ask(write(DEVICE_OUTPUT)), "");
        assert!(late.tell(phase(Phase::Overlay)).contains("not flushed"));
        assert_eq!(late.ask(Request::flush(DEVICE_OUTPUT)) + &late.tell(phase(Phase::Overlay)), "");
        assert!(late.ask(write(DEVICE_OUTPUT)).contains("said to be complete"));
        assert!(late.tell(phase(Phase::Target)).contains("phase 2 after phase 3"));
    }

    #[test]
    fn nothing_follows_before_what_was_written_is_read_back() {
        let verify = || Kind::Event(Event { kind: Some(Told::Verify(Verify::default())) }.encode_to_vec());
        let asked = |last_phase| {
            let mut handler = handler(last_phase);
            handler.events.verification = Some(Verification::default());
            assert_eq!(handler.tell(plan()) + &handler.tell(phase(Phase::Target)), "");
            handler
        };
        let mut skipped = asked(Phase::Overlay);
        assert!(skipped.tell(phase(Phase::Overlay)).contains("0 bytes of 0 were read back"));
        let mut kept = asked(Phase::Target);
        assert!(kept.tell(done()).contains("were read back"));
        let mut early = asked(Phase::Overlay);
        assert_eq!(early.ask(write(DEVICE_OUTPUT)), "");
        assert!(early.tell(verify()).contains("not complete and flushed"));
        assert_eq!(early.ask(Request::flush(DEVICE_OUTPUT)) + &early.tell(verify()), "");
        assert_eq!(early.tell(phase(Phase::Overlay)), "");
        assert!(early.tell(verify()).contains("not complete and flushed"), "too late");
        let mut unasked = handler(Phase::Overlay);
        assert_eq!(unasked.tell(plan()) + &unasked.tell(phase(Phase::Target)), "");
        assert!(unasked.tell(verify()).contains("nobody asked for"));
    }

    #[test]
    fn what_depends_on_an_atomic_target_waits_for_its_end() {
        let mut handler = handler(Phase::Overlay);
        handler.devices.await_complete();
        assert_eq!(handler.tell(plan()) + &handler.tell(phase(Phase::Target)), "");
        for request in [write(OVERLAY), Request::flush(OVERLAY), write(DEVICE_OUTPUT), Request::flush(DEVICE_OUTPUT)] {
            assert_eq!(handler.ask(request), "", "a record of the parent comes first");
        }
        assert!(handler.ask(write(OVERLAY)).contains("before the target is said to be complete"));
        assert!(handler.tell(phase(Phase::Overlay)).contains("before the target is said to be complete"));
        let complete = || Kind::Event(Event { kind: Some(Told::Complete(Complete {})) }.encode_to_vec());
        assert!(handler.tell(complete()).contains("nobody asked for"));
        handler.devices.complete_target();
        assert!(handler.ask(write(DEVICE_OUTPUT)).contains("after it was said to be complete"));
        assert_eq!(handler.ask(write(OVERLAY)) + &handler.ask(Request::flush(OVERLAY)), "");
        assert_eq!(handler.tell(phase(Phase::Overlay)) + &handler.ask(write(OVERLAY)), "");
    }

    #[test]
    fn children_are_changed_last_if_at_all() {
        const CHILD: u32 = 1;
        let with_child = |last_phase, keep_overlay| {
            let mut handler = handler(last_phase);
            let file = tempfile::tempfile().unwrap_or_else(|error| unreachable!("{error}"));
            let _ = file.set_len(8192);
            handler.devices.attach(CHILD, Device::new(file, true, 8192, 9000, false).with_part(Part::Child));
            handler.events.keep_overlay = keep_overlay;
            assert_eq!(handler.tell(plan()) + &handler.tell(phase(Phase::Target)), "");
            handler
        };
        let mut none = with_child(Phase::Overlay, false);
        assert_eq!(none.tell(phase(Phase::Overlay)), "");
        assert!(none.tell(phase(Phase::Children)).contains("that are to stay"));
        let mut early = with_child(Phase::Children, false);
        assert!(early.ask(write(CHILD)).contains("before that parent is complete"));
        assert!(early.tell(phase(Phase::Children)).contains("before the overlay was emptied"));
        assert_eq!(early.tell(phase(Phase::Overlay)) + &early.ask(write(OVERLAY)), "");
        assert!(early.tell(phase(Phase::Children)).contains("not flushed"));
        assert_eq!(early.ask(Request::flush(OVERLAY)), "");
        assert!(early.tell(done()).contains("before its work"), "no child was changed");
        assert_eq!(early.tell(phase(Phase::Children)) + &early.ask(write(CHILD)), "");
        assert!(early.ask(write(OVERLAY)).contains("said to be complete"));
        assert!(early.tell(done()).contains("device 1 is not flushed"));
        assert_eq!(early.ask(Request::flush(CHILD)) + &early.tell(done()), "");
        let mut kept = with_child(Phase::Children, true);
        assert!(kept.tell(phase(Phase::Overlay)).contains("keep its content"));
        assert_eq!(kept.tell(phase(Phase::Children)) + &kept.tell(done()), "");
    }

    #[test]
    fn siblings_are_damaged_by_data_alone() {
        let planned = |bytes| {
            let mut handler = handler(Phase::Overlay);
            handler.events.has_siblings = true;
            (handler.tell(told(Plan { bytes, ..Plan::default() })), handler.events.damages_siblings)
        };
        assert_eq!(planned(0), (String::new(), false));
        let (why, damages) = planned(512);
        assert!(damages && why.contains("other images"), "{why}");
    }

    #[test]
    fn a_record_of_the_parent_is_small_and_durable() {
        let begun = || {
            let mut handler = handler(Phase::Overlay);
            assert_eq!(handler.tell(plan()) + &handler.tell(phase(Phase::Target)), "");
            handler
        };
        let not = "no record of its parent";
        assert!(begun().ask(Request::set_length(OVERLAY, 0)).contains(not));
        assert!(begun().ask(Request::zero(OVERLAY, 0, 512)).contains(not));
        assert!(begun().ask(Request::write(OVERLAY, 4000, 0, 512)).contains(not), "two ranges");
        let mut handler = begun();
        assert_eq!(handler.ask(write(OVERLAY)) + &handler.ask(Request::write(OVERLAY, 4000, 0, 96)), "");
        assert!(handler.ask(Request::write(OVERLAY, 4096, 0, 1)).contains(not), "another range");
        assert!(handler.ask(write(DEVICE_OUTPUT)).contains("is flushed"));
        assert_eq!(handler.ask(Request::flush(OVERLAY)) + &handler.ask(write(DEVICE_OUTPUT)), "");
    }

    #[test]
    fn a_success_has_to_be_one() {
        let failed = |error| {
            let failure = FailureMessage { error, text: "L1 table".to_owned(), ..FailureMessage::default() };
            Kind::End(EndMessage { outcome: Some(End::Failure(failure)) })
        };
        assert!(handler(Phase::Look).tell(failed(0)).contains("without a code: L1 table"));
        assert!(handler(Phase::Look).tell(done()).contains("before its work"));
        let mut halfway = handler(Phase::Overlay);
        assert_eq!(halfway.tell(plan()) + &halfway.tell(phase(Phase::Target)), "");
        assert!(halfway.tell(done()).contains("before its work"));
        assert_eq!(halfway.tell(phase(Phase::Overlay)) + &halfway.ask(write(OVERLAY)), "");
        assert!(halfway.tell(done()).contains("device 0 is not flushed"));
        assert_eq!(halfway.tell(failed(8)), "");
    }

    #[test]
    fn a_plan_that_lies_is_not_accepted() {
        let lie = |plan| handler(Phase::Overlay).tell(told(plan));
        assert!(lie(Plan { bytes: 1001, ..Plan::default() }).contains("1001 bytes"));
        assert!(lie(Plan { backing_final_length: 8193, ..Plan::default() }).contains("allows 8192"));
        let mut twice = handler(Phase::Overlay);
        assert_eq!(twice.tell(plan()), "");
        assert!(twice.tell(plan()).contains("second plan"));
    }
}
