//! A guest that attacks the images and the host through the ring, against real files: it is ended with a clear error, no file
//! is touched that it may not write, and what it may write stays within its bound.

use crate::support::{on_both, spec};
use instar::check::{CheckEvents, Grant};
use instar::commit::{CommitEvents, PlanBounds};
use instar::devices::{Device, Devices};
use instar::operation::{Cancel, Handler};
use instar::sandbox::{self, BadRequest, BufferAccess, Host, Report, Sandbox, SandboxError};
use instar_guest_abi::{DeviceRole, ErrorCode, Phase, Request, DEVICE_OUTPUT};
use instar_guest_protocol::{guest_message::Kind, Message};
use instar_guest_testmod::Scenario;
use std::fs::{read, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use tempfile::TempDir;

/// Bytes of each file, and to how many the output may grow.
const LENGTH: u64 = 1 << 20;
const BOUND: u64 = 3 << 20;

/// Executes requests as a commit does, and counts messages.
struct TestHost {
    devices: Devices,
    messages: usize,
    bytes: usize,
    /// The statuses of the last requests.
    statuses: Vec<i32>,
}

impl Host for TestHost {
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        let result = self.devices.execute(memory, requests);
        self.statuses = requests.iter().map(|request| request.status).collect();
        result
    }

    fn message(&mut self, message: Kind) -> Result<(), BadRequest> {
        self.messages += 1;
        self.bytes += instar_guest_protocol::GuestMessage { kind: Some(message) }.encoded_len();
        Ok(())
    }
}

/// The images of a commit, and a file beside them that has nothing to do with it.
struct Images {
    dir: TempDir,
}

const NAMES: [&str; 4] = ["overlay", "ancestor", "output", "beside"];

impl Images {
    fn new() -> Self {
        let images = Self { dir: TempDir::new().unwrap() };
        for (seed, name) in NAMES.iter().enumerate() {
            std::fs::write(images.path(name), Self::content(seed)).unwrap();
        }
        images
    }

    fn content(seed: usize) -> Vec<u8> {
        (0..usize::try_from(LENGTH).unwrap()).map(|i| (i / 64 * 7 + seed).to_le_bytes()[0] | 1).collect()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self, name: &str, write: bool) -> File {
        File::options().read(true).write(write).open(self.path(name)).unwrap()
    }

    fn run(&self, on: &dyn Sandbox, scenario: Scenario) -> (TestHost, Result<Report, SandboxError>) {
        let mut devices = self.devices();
        devices.enter(Phase::Target).unwrap();
        let mut host = TestHost { devices, messages: 0, bytes: 0, statuses: Vec::new() };
        let result = sandbox::run(on, &spec(on, scenario).with_message_limit(2 << 20), &mut host);
        (host, result)
    }

    fn devices(&self) -> Devices {
        let mut devices = Devices::new();
        let overlay = DeviceRole::Overlay { emptied: true, identity: true };
        let device = |name| Device::new(self.open(name, true), true, LENGTH, LENGTH, false);
        devices.attach(0, device("overlay").with_role(overlay));
        // Its descriptor could be written: it is the slot that may not.
        devices.attach(1, device("ancestor").with_role(DeviceRole::Read));
        devices.attach(DEVICE_OUTPUT, Device::new(self.open("output", true), true, LENGTH, BOUND, false));
        devices
    }

    /// Run a guest as a commit does, which it may go on with up to this phase.
    fn commit(
        &self,
        on: &dyn Sandbox,
        scenario: Scenario,
        last_phase: Phase,
    ) -> (Handler<CommitEvents>, Result<Report, SandboxError>) {
        let bounds = PlanBounds { virtual_size: LENGTH, longest: BOUND, ..PlanBounds::default() };
        let events = CommitEvents { last_phase, bounds, ..CommitEvents::default() };
        let mut handler = Handler::new(self.devices(), events, Cancel::new());
        let result = sandbox::run(on, &spec(on, scenario), &mut handler);
        (handler, result)
    }

    /// Run a guest as a repair of the output does.
    fn repair(&self, on: &dyn Sandbox, scenario: Scenario) -> (Handler<CheckEvents>, Result<Report, SandboxError>) {
        let mut devices = Devices::new();
        let device = |name, length| Device::new(self.open(name, true), true, LENGTH, length, false);
        devices.attach(0, device("overlay", LENGTH).with_role(DeviceRole::Read));
        devices.attach(DEVICE_OUTPUT, device("output", BOUND).with_role(DeviceRole::Target));
        let events = CheckEvents::repairing(Grant { last_phase: Phase::Target, longest: BOUND });
        let mut handler = Handler::new(devices, events, Cancel::new());
        let result = sandbox::run(on, &spec(on, scenario), &mut handler);
        (handler, result)
    }

    /// Whether a file has other bytes than at the start.
    fn is_changed(&self, name: &str) -> bool {
        let seed = NAMES.iter().position(|one| *one == name).unwrap();
        read(self.path(name)).unwrap() != Self::content(seed)
    }

    /// Only the output may be different.
    fn assert_others_untouched(&self, scenario: Scenario) {
        for (seed, name) in NAMES.iter().enumerate().filter(|(_, name)| **name != "output") {
            assert!(read(self.path(name)).unwrap() == Self::content(seed), "{scenario:?} has changed {name}");
        }
        assert_eq!(std::fs::read_dir(self.dir.path()).unwrap().count(), NAMES.len(), "{scenario:?} has made a file");
    }
}

fn assert_ended(result: Result<Report, SandboxError>, scenario: Scenario, why: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestProtocol, "{scenario:?}");
    let text = error.to_string();
    assert!(text.starts_with("the guest broke the protocol: ") && text.contains(why), "{scenario:?}: {text}");
}

on_both! {
    fn a_file_grows_to_its_bound_and_no_further(on) {
        for scenario in [Scenario::GrowLength, Scenario::GrowWrite, Scenario::GrowCopy] {
            let images = Images::new();
            let (_, result) = images.run(on, scenario);
            assert_ended(result, scenario, "more than the file may grow in this commit");
            let output = images.path("output").metadata().unwrap();
            assert_eq!(output.len(), BOUND, "{scenario:?}");
            assert!(output.blocks() * 512 <= BOUND + (1 << 20), "{scenario:?} takes {} blocks", output.blocks());
            images.assert_others_untouched(scenario);
        }
    }
}

on_both! {
    fn requests_that_break_a_rule_change_nothing(on) {
        for (scenario, why) in [
            (Scenario::WriteReadOnly, "a change of a device that is read-only"),
            (Scenario::ReadAbsent, "a device that is absent"),
            (Scenario::CopyOverflow, "a source range that overflows"),
            (Scenario::BufferOutside, "a buffer outside the heap"),
            (Scenario::DoorbellEmpty, "a doorbell for 0 requests, 1 to 256 are possible"),
            (Scenario::DoorbellCount, "a doorbell for 257 requests, 1 to 256 are possible"),
            (Scenario::RingGarbage, "an operation that does not exist"),
        ] {
            let images = Images::new();
            let (_, result) = images.run(on, scenario);
            assert_ended(result, scenario, why);
            assert!(read(images.path("output")).unwrap() == Images::content(2), "{scenario:?}");
            images.assert_others_untouched(scenario);
        }
    }
}

on_both! {
    fn garbage_between_good_requests_ends_the_guest_there(on) {
        let images = Images::new();
        let (host, result) = images.run(on, Scenario::RingMixed);
        assert_ended(result, Scenario::RingMixed, "an operation that does not exist");
        // The first was executed, the third was not looked at.
        assert_eq!(host.statuses, [0, -1, -1]);
        let mut expected = Images::content(2);
        expected[..512].fill(0x77);
        assert!(read(images.path("output")).unwrap() == expected);
        images.assert_others_untouched(Scenario::RingMixed);
    }
}

on_both! {
    fn floods_of_messages_have_an_end(on) {
        /// What a guest may send in all, in bytes.
        const LIMIT: usize = 2 << 20;
        for (scenario, fewest) in [(Scenario::LongMessageFlood, 100), (Scenario::EmptyMessageFlood, 8_000)] {
            let images = Images::new();
            let (host, result) = images.run(on, scenario);
            assert_ended(result, scenario, "more messages than it may send");
            assert!(host.bytes <= LIMIT && host.messages >= fewest, "{scenario:?}: {} {}", host.messages, host.bytes);
            images.assert_others_untouched(scenario);
        }
    }
}

on_both! {
    fn a_loop_after_a_request_is_a_stall_and_a_ring_without_a_bell_is_nothing(on) {
        let images = Images::new();
        let error = images.run(on, Scenario::StallAfterRequest).1.unwrap_err();
        assert_eq!(error.code(), ErrorCode::GuestStalled);
        assert!(read(images.path("output")).unwrap() == Images::content(2));
        images.assert_others_untouched(Scenario::StallAfterRequest);
    }
}

on_both! {
    fn what_is_changed_too_early_is_not_changed(on) {
        for (scenario, last_phase, why) in [
            (Scenario::EarlyWrite, Phase::Overlay, "before a plan was accepted"),
            (Scenario::DryRunWrite, Phase::Inspect, "before a plan was accepted"),
            (Scenario::LyingPlan, Phase::Overlay, "where its verdict allows"),
            (Scenario::WholeCommit, Phase::Inspect, "announced in a dry run"),
            (Scenario::FailureWithoutCode, Phase::Overlay, "an error without a code: the L1 table"),
        ] {
            let images = Images::new();
            let (handler, result) = images.commit(on, scenario, last_phase);
            assert_ended(result, scenario, why);
            assert!(!images.is_changed("output") && !handler.devices.any_changed(), "{scenario:?}");
            images.assert_others_untouched(scenario);
        }
    }
}

on_both! {
    fn an_overlay_is_changed_after_its_target_or_not_at_all(on) {
        for (scenario, last_phase, why) in [
            (Scenario::EarlyOverlay, Phase::Overlay, "before the target is complete"),
            (Scenario::DirtyOverlay, Phase::Overlay, "while device 512 of the target is not flushed"),
            (Scenario::FalseSuccess, Phase::Overlay, "before its work was done"),
            (Scenario::FalseSuccess, Phase::Target, "while device 512 is not flushed"),
        ] {
            let images = Images::new();
            let (handler, result) = images.commit(on, scenario, last_phase);
            assert_ended(result, scenario, why);
            assert!(images.is_changed("output") && handler.devices.any_changed(), "{scenario:?}");
            images.assert_others_untouched(scenario);
        }
    }
}

on_both! {
    fn of_an_overlay_that_is_kept_only_the_record_of_its_parent_changes(on) {
        for (scenario, why) in
            [(Scenario::WholeCommit, "that is to keep its content"), (Scenario::LargeRecord, "no record of its parent")]
        {
            let images = Images::new();
            let (_, result) = images.commit(on, scenario, Phase::Target);
            assert_ended(result, scenario, why);
            let overlay = read(images.path("overlay")).unwrap();
            assert!(overlay[..512].iter().all(|&byte| byte == 0x77) && overlay[512..] == Images::content(0)[512..]);
        }
    }
}

on_both! {
    fn a_commit_that_keeps_the_order_is_done(on) {
        let images = Images::new();
        let (handler, result) = images.commit(on, Scenario::WholeCommit, Phase::Overlay);
        result.unwrap();
        assert_eq!((handler.end, handler.events.outcome.clusters_committed), (Some(Ok(())), 1));
        assert_eq!(handler.log.lines(), ["512 bytes are left"]);
        assert!(images.is_changed("output") && read(images.path("overlay")).unwrap().len() == 512);
    }
}

on_both! {
    fn a_repair_stays_within_its_plan(on) {
        for (scenario, changes, why) in [
            (Scenario::EarlyWrite, false, "before a plan was accepted"),
            (Scenario::RepairEarly, false, "before a plan was accepted"),
            (Scenario::RepairLyingPlan, false, "bytes long, where 3145728 are allowed"),
            (Scenario::RepairOfNothing, false, "where nothing may be changed"),
            (Scenario::RepairGrow, true, "more than the file may grow"),
            (Scenario::RepairUnflushed, true, "while device 512 is not flushed"),
        ] {
            let images = Images::new();
            let (handler, result) = images.repair(on, scenario);
            assert_ended(result, scenario, why);
            assert_eq!((images.is_changed("output"), handler.devices.any_changed()), (changes, changes), "{scenario:?}");
            assert!(images.path("output").metadata().unwrap().len() <= BOUND, "{scenario:?}");
            images.assert_others_untouched(scenario);
        }
    }
}

on_both! {
    fn a_request_that_breaks_a_rule_names_who_asked(on) {
        let error = Images::new().commit(on, Scenario::StackBuffer, Phase::Inspect).1;
        // Through core, which knows who calls it.
        let text = error.unwrap_err().to_string();
        assert!(text.contains("device 0") && text.contains("(asked for by test 0.9.1+0x"), "{text}");
    }
}
