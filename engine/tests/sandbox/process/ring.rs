//! The doorbell and what the host reads because of it: garbage, floods, silence, memory that changes meanwhile.

use super::code::{assemble, call, failure, put, ring, run, wait};
use crate::support::{run as run_scenario, spec, TestHost};
use instar::sandbox::{self, Process, SandboxError};
use instar_guest_abi::{ErrorCode, Request, PORT_DOORBELL, PORT_EXIT, PORT_FAULT, PORT_JOIN, PORT_MESSAGE, PORT_WAKE};
use instar_guest_testmod::Scenario;
use std::time::Instant;

#[test]
fn a_ring_that_changes_while_the_host_reads_it_is_read_once() {
    let mut host = TestHost::default();
    let result = sandbox::run(&Process, &spec(&Process, Scenario::RingWhileServed), &mut host);
    // Whatever the host saw is a request that it checked: what it was asked for first, or what breaks a rule.
    match result {
        Ok(_) => assert!(host.written == [0x77; 512] && host.batches.len() == 2000),
        Err(error) => assert!(error.to_string().contains("a buffer outside the heap"), "{error}"),
    }
}

#[test]
fn a_guest_that_takes_no_answers_is_ended() {
    let started = Instant::now();
    let error = run_scenario(&Process, Scenario::AnswersNotTaken).1.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestProtocol, "{error}");
    assert!(started.elapsed().as_secs() < 30);
}

#[test]
fn a_guest_that_waits_for_nothing_is_ended() {
    // It sleeps in the kernel, and uses no processor time: at once, and after an answer that it was owed.
    for code in [wait(), [put(Request::flush(0)), ring(PORT_DOORBELL.into(), 1), wait(), wait()].concat()] {
        let started = Instant::now();
        let error = failure(&code);
        let SandboxError::GuestAsleep { time: 2000..4000, place } = &error else { panic!("{error}") };
        assert!(place.starts_with("core "), "{error}");
        assert_eq!(error.code(), ErrorCode::GuestStalled);
        assert!(started.elapsed().as_secs() < 60);
    }
}

#[test]
fn ports_that_are_none_end_the_guest() {
    const KNOWN: [u16; 6] = [PORT_DOORBELL, PORT_MESSAGE, PORT_FAULT, PORT_EXIT, PORT_WAKE, PORT_JOIN];
    // The first are the numbers that the starter has for its steps: what the guest rings is not taken for one.
    let ports = (0..24_u32).chain(0x500..0x520).chain([0xffff, 0x1_0000, 0x1_0513, 0x8000_0513, u32::MAX]);
    for port in ports.filter(|port| !KNOWN.iter().any(|known| u32::from(*known) == *port)) {
        let error = failure(&ring(port, 0xffff_ffff));
        assert_eq!(error.code(), ErrorCode::GuestProtocol, "{error}");
        assert!(error.to_string().contains(&format!("`out` to unassigned port {port:#x}")), "{error}");
    }
}

#[test]
fn values_that_are_none_end_the_guest() {
    for (port, value) in [
        (PORT_DOORBELL, 0),
        (PORT_DOORBELL, 257),
        (PORT_DOORBELL, u32::MAX),
        (PORT_MESSAGE, 0),
        (PORT_MESSAGE, 16385),
        (PORT_MESSAGE, u32::MAX),
        // An empty buffer is no message.
        (PORT_MESSAGE, 16384),
    ] {
        let error = failure(&ring(port.into(), value));
        assert_eq!(error.code(), ErrorCode::GuestProtocol, "{port:#x} {value}: {error}");
    }
    // Of the end, any.
    run(&ring(PORT_EXIT.into(), u32::MAX)).unwrap();
}

#[test]
fn a_guest_that_goes_while_it_is_served_is_missed() {
    let end = [assemble!("xor edi, edi"), &call(super::code::EXIT)[..]].concat();
    let rung = [put(Request::flush(0)), ring(PORT_DOORBELL.into(), 1)].concat();
    let after_answer = [&rung[..], &wait(), &end].concat();
    for code in [end.clone(), [&rung[..], &end].concat(), after_answer, [&rung[..], &rung, &rung, &end].concat()] {
        let error = failure(&code);
        assert_eq!(error.to_string(), "the guest broke the protocol: its process ended with status 0");
    }
    // What it said before that counts: it was done.
    run(&[&ring(PORT_EXIT.into(), 0)[..], &end].concat()).unwrap();
}

#[test]
fn a_flood_that_nobody_has_read_yet_waits() {
    // Ring for the end until the socket is full, which stops the guest, and not the host.
    let ring = ring(PORT_EXIT.into(), 0);
    let back = -i8::try_from(ring.len() + 2).unwrap();
    let report = run(&[&ring[..], &[0xeb], &back.to_le_bytes()].concat());
    assert_eq!(report.unwrap().exits, 1);
}
