//! The sandboxes with real guests, good and hostile: one suite for all of them. Without KVM, or without seccomp, these tests fail:
//! they are not skipped.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod attacks;
mod hostile;
mod process;
mod support;
mod virtual_machine;
mod workers;

use instar::sandbox::{self, Program, SandboxError};
use instar_guest_abi::{ErrorCode, RequestOp, DEVICE_OUTPUT, ERROR_PLUGIN_UNAVAILABLE};
use instar_guest_testmod::Scenario;
use support::{on_both, run, spec, TestHost};

on_both! {
    fn a_good_guest_runs_at_ring_3(on) {
        let (host, report) = run(on, Scenario::Good);
        let report = report.unwrap();
        eprintln!("{report:#?}");
        assert_eq!(host.outcome.unwrap().clusters_committed, 0x5a);
        assert_eq!(host.logs.len(), 2);
        assert!(host.logs[0] == "1000 entries" && host.logs[1].contains('.'), "a formatted float: {:?}", host.logs);
        assert_eq!(host.batches, [256, 256, 88]);
        assert_eq!(report.sandbox, on.name());
        assert_eq!((report.ring, report.requests, report.doorbells, report.messages), (3, 600, 3, 3));
        assert_eq!(report.exits, 7, "three doorbells, three messages and the end");
    }
}

on_both! {
    fn start_up_takes_milliseconds(on) {
        // The first run pays for the page cache; the best of some is what is bounded.
        let best = (0..5)
            .map(|_| {
                let report = run(on, Scenario::Good).1.unwrap();
                report.time_create + report.time_load + report.time_first_exit
            })
            .min()
            .unwrap();
        assert!(best.as_millis() < 100, "{best:?} from nothing to the first exit");
    }
}

on_both! {
    fn drivers_work_across_modules(on) {
        let (host, report) = run(on, Scenario::Foreign);
        report.unwrap();
        assert_eq!(host.outcome.unwrap().clusters_committed, 1 << 20);
        assert_eq!(host.ops, [RequestOp::Copy as u32, RequestOp::Flush as u32]);
        let copy = host.copies[0];
        assert_eq!((copy.src_device, copy.device, copy.length), (0, DEVICE_OUTPUT, 1 << 20));
    }
}

on_both! {
    fn buffers_on_the_stack_and_in_constants_work(on) {
        let (host, report) = run(on, Scenario::StackBuffer);
        report.unwrap();
        assert_eq!((host.logs[0].as_str(), host.outcome.unwrap().clusters_committed), ("Ok(())", 0x5a));
        assert_eq!(host.written, [7; 64]);
    }
}

on_both! {
    fn the_engines_own_operation_runs(on) {
        let mut host = TestHost::default();
        sandbox::run(on, &Program::new(instar::commit::MODULE, vec![], support::members(), vec![]), &mut host).unwrap();
        assert!(host
            .failure
            .is_some_and(|failure| failure.error == ERROR_PLUGIN_UNAVAILABLE && failure.text.contains("not loaded")));
    }
}

on_both! {
    fn an_exit_without_a_result_is_left_to_the_handler(on) {
        let (host, report) = run(on, Scenario::Silent);
        assert_eq!(report.unwrap().exits, 1);
        assert!(host.outcome.is_none() && host.failure.is_none());
    }
}

on_both! {
    fn the_handler_can_interrupt(on) {
        let mut host = TestHost { interrupt_after: Some(3), ..TestHost::default() };
        let error = sandbox::run(on, &spec(on, Scenario::DoorbellFlood), &mut host).unwrap_err();
        assert_eq!(error, SandboxError::Interrupted);
        assert_eq!((host.batches.len(), error.code()), (3, ErrorCode::Interrupted));
    }
}

on_both! {
    fn an_interruption_during_the_last_request_is_one(on) {
        let (host, report) = run(on, Scenario::Good);
        report.unwrap();
        // The guest would report what became of that request, perhaps as a failure that is none.
        let mut interrupted = TestHost { interrupt_after: Some(host.batches.len()), ..TestHost::default() };
        let error = sandbox::run(on, &spec(on, Scenario::Good), &mut interrupted).unwrap_err();
        assert_eq!(error, SandboxError::Interrupted);
        assert!(interrupted.outcome.is_none() && interrupted.failure.is_none());
    }
}

on_both! {
    fn modules_of_the_wrong_kind_are_named(on) {
        let swapped = spec(on, Scenario::Good).with_operation(support::module("plain", support::format()));
        let error = sandbox::run(on, &swapped, &mut TestHost::default()).unwrap_err().to_string();
        assert!(error.contains("guest panic: module plain: it is of kind 1"), "{error}");
        let junk = spec(on, Scenario::Good).with_operation(support::module("junk", b"junk"));
        let error = sandbox::run(on, &junk, &mut TestHost::default()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::PluginUnavailable);
        assert!(error.to_string().starts_with("guest module junk: it is not"), "{error}");
    }
}
