//! Guests with several processors: what workers do, and each wall that one which misbehaves meets.

use crate::support::{on_both, run_with_workers, spec};
use instar::sandbox::{BadRequest, BufferAccess, Host, Ready, Sandbox, SandboxError};
use instar_guest_abi::{ErrorCode, Request, MAX_WORKERS};
use instar_guest_protocol::guest_message::Kind;
use instar_guest_testmod::Scenario;
use std::time::{Duration, Instant};

/// How many more processors the guests have, whatever this machine has.
const WORKERS: usize = 3;

/// Why a guest was ended.
fn ended(on: &dyn Sandbox, scenario: Scenario) -> SandboxError {
    run_with_workers(on, WORKERS, scenario).1.unwrap_err()
}

fn assert_protocol(on: &dyn Sandbox, scenario: Scenario, what: &str) {
    let error = ended(on, scenario);
    assert_eq!(error.code(), ErrorCode::GuestProtocol, "{scenario:?}: {error}");
    assert!(error.to_string().contains(what), "{scenario:?}: {error}");
}

on_both! {
    fn work_is_shared_and_done_once(on) {
        for workers in [0, 1, 2, MAX_WORKERS, MAX_WORKERS + 5] {
            let (host, report) = run_with_workers(on, workers, Scenario::WorkersGood);
            let (report, workers) = (report.unwrap(), workers.min(MAX_WORKERS));
            assert_eq!(host.outcome.unwrap().clusters_committed, workers as u64 + 1, "processors");
            assert!(host.logs[0].ends_with("all true"), "{:?}", host.logs);
            assert_eq!(host.logs[0].starts_with("0 items"), workers == 0, "{workers}: {:?}", host.logs);
            assert_eq!(report.workers, workers);
            assert_eq!((report.exits, report.messages), (3, 2), "the same however many there are");
        }
    }
}

on_both! {
    fn a_worker_does_nothing_but_sleep(on) {
        for (scenario, port) in [
            (Scenario::WorkerRings, "0x510"),
            (Scenario::WorkerSends, "0x511"),
            (Scenario::WorkerExits, "0x513"),
            (Scenario::WorkerWakes, "0x514"),
            (Scenario::WorkerJoins, "0x515"),
        ] {
            assert_protocol(on, scenario, &format!("`out` of a worker to port {port}"));
        }
    }
}

on_both! {
    fn the_fault_of_a_worker_is_named(on) {
        for scenario in [Scenario::WorkerFaults, Scenario::AllFault] {
            let error = ended(on, scenario);
            assert_eq!(error.code(), ErrorCode::GuestFault, "{error}");
            let text = error.to_string();
            assert!(text.starts_with("guest fault: page fault writing address 0x0, rip 0x"), "{text}");
            assert!(text.contains("(test 0.9.1+0x"), "{text}");
        }
        let text = ended(on, Scenario::WorkerStackOverflow).to_string();
        assert!(text.starts_with("guest fault: stack overflow writing address 0x3"), "{text}");
    }
}

on_both! {
    fn the_panic_of_a_worker_is_told(on) {
        let text = ended(on, Scenario::WorkerPanics).to_string();
        assert!(text.starts_with("guest panic: a worker panics on purpose"), "{text}");
        assert!(text.contains("in test 0.9.1+0x"), "{text}");
        let text = ended(on, Scenario::WorkerAllocates).to_string();
        assert!(text.starts_with("guest panic: a worker allocates memory"), "{text}");
    }
}

on_both! {
    fn a_worker_that_loops_is_a_stall_of_the_guest(on) {
        for (scenario, place) in [(Scenario::WorkerStalls, "test 0.9.1+0x"), (Scenario::WakeFlood, "0.")] {
            let start = Instant::now();
            let error = ended(on, scenario);
            assert_eq!(error.code(), ErrorCode::GuestStalled, "{scenario:?}: {error}");
            assert!(error.to_string().contains(place), "{scenario:?}: {error}");
            // Two seconds of processor time, of which a flood in a process gets little where others want the processors as well.
            assert!(start.elapsed() < Duration::from_secs(300), "{scenario:?}: {:?}", start.elapsed());
        }
    }
}

on_both! {
    fn workers_are_woken_as_they_are(on) {
        assert_protocol(on, Scenario::WakeTooMany, "waking 4 workers, and there are 3");
        assert_protocol(on, Scenario::WakeNone, "waking 0 workers, and there are 3");
        assert_protocol(on, Scenario::WakeTwice, "waking workers while they are at work");
        let (_, alone) = run_with_workers(on, 0, Scenario::WakeTooMany);
        assert!(alone.unwrap_err().to_string().contains("waking 1 workers, and there are 0"));
    }
}

on_both! {
    fn the_end_is_none_while_workers_are_at_work(on) {
        assert_protocol(on, Scenario::ExitWhileWorking, "it ended while its workers were at work");
    }
}

on_both! {
    fn what_a_worker_writes_to_the_ring_is_checked_as_it_is_taken(on) {
        let (host, result) = run_with_workers(on, WORKERS, Scenario::WorkerScribbles);
        // The host takes a request whole or not at all: one of other bytes is none of its operations.
        match result {
            Ok(_) => assert_eq!(host.batches.len(), 200),
            Err(error) => {
                assert_eq!(error.code(), ErrorCode::GuestProtocol, "{error}");
                assert!(host.batches.len() <= 200);
            }
        }
    }
}

/// Looks at each request again when it has long been another one in the guest's memory.
#[derive(Default)]
struct Slow {
    served: usize,
    ended: bool,
}

impl Host for Slow {
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        let [request] = requests else { panic!("{requests:?}") };
        let first = *request;
        let count = || {
            let mut count = [0; 8];
            memory.heap_slice(first.buffer, 8).unwrap().copy_to(&mut count[..]);
            u64::from_le_bytes(count)
        };
        let (begin, before) = (Instant::now(), count());
        // All three requests of the worker have been in the ring meanwhile.
        while count() < before + 4 {
            assert!(begin.elapsed() < Duration::from_secs(60), "the worker does nothing");
            std::thread::yield_now();
        }
        assert_eq!(*request, first, "it changed while it was served");
        request.status = instar_guest_abi::request_status::OK;
        self.served += 1;
        Ok(())
    }

    fn message(&mut self, message: Kind) -> Result<(), BadRequest> {
        self.ended |= matches!(message, Kind::End(_));
        Ok(())
    }

    fn interrupted(&self) -> bool {
        false
    }
}

on_both! {
    fn a_request_that_a_worker_changes_is_the_one_that_was_taken(on) {
        let mut host = Slow::default();
        let ready: Box<dyn Ready> = on.acquire(1).unwrap();
        ready.run(&spec(on, Scenario::WorkerSwaps), &mut host).unwrap();
        assert_eq!((host.served, host.ended), (200, true));
    }
}

/// Interrupts the guest when its workers have long been at work.
struct Impatient(Instant);

impl Host for Impatient {
    fn requests(&mut self, _: &dyn BufferAccess, _: &mut [Request]) -> Result<(), BadRequest> {
        Ok(())
    }

    fn message(&mut self, _: Kind) -> Result<(), BadRequest> {
        Ok(())
    }

    fn interrupted(&self) -> bool {
        self.0.elapsed() > Duration::from_secs(1)
    }
}

on_both! {
    fn an_interruption_ends_workers_too(on) {
        let mut program = spec(on, Scenario::WorkerStalls);
        program.stall_limit = Duration::from_secs(3600);
        let start = Instant::now();
        let ready: Box<dyn Ready> = on.acquire(WORKERS).unwrap();
        assert_eq!(ready.run(&program, &mut Impatient(start)).unwrap_err(), SandboxError::Interrupted);
        assert!((1..60).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    }
}
