//! Tests of the host's answers to the guest of a commit.

use super::*;
use crate::devices::Device;
use crate::operation::test_buffers::Zeroes;
use crate::operation::{Cancel, Handler};
use crate::sandbox::Host;
use instar_guest_abi::{DeviceRole, DEVICE_OUTPUT};
use instar_guest_protocol::commit::Complete;
use instar_guest_protocol::end_message::Outcome as End;
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::{EndMessage, FailureMessage, LogMessage, Message, PhaseMessage};

const OVERLAY: u32 = 0;

fn handler(last_phase: Phase) -> Handler<CommitEvents> {
    let mut devices = Devices::new();
    let parts = [(OVERLAY, DeviceRole::Overlay { emptied: true, identity: true }), (DEVICE_OUTPUT, DeviceRole::Target)];
    for (number, part) in parts {
        let file = tempfile::tempfile().unwrap_or_else(|error| unreachable!("{error}"));
        let _ = file.set_len(8192);
        devices.attach(number, Device::new(file, true, 8192, 8192, false).with_role(part));
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
        let mut dry = handler(Phase::Inspect);
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
        handler.devices.attach(CHILD, Device::new(file, true, 8192, 9000, false).with_role(DeviceRole::Child));
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
    assert!(handler(Phase::Inspect).tell(failed(0)).contains("without a code: L1 table"));
    assert!(handler(Phase::Inspect).tell(done()).contains("before its work"));
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
