//! Random bytes as a guest: whatever they do, an error is what is left.

use super::code::{EXIT, HEAP};
use super::life::leaving_nothing;
use super::workers::waking;
use crate::support::{raw_code, spec, TestHost};
use instar::sandbox::{Process, Sandbox};
use instar_guest_abi::{ErrorCode, RING_ADDR};
use instar_guest_testmod::Scenario;
use std::time::{Duration, Instant};

/// How many guests, if the environment does not say otherwise by `INSTAR_RANDOM_GUESTS`.
const GUESTS: u64 = 150;

/// xorshift64*: the same numbers everywhere.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn bytes(&mut self, count: u64) -> Vec<u8> {
        (0..count).map(|_| self.next().to_be_bytes()[0]).collect()
    }
}

/// Bytes; in every other guest with registers that make a doorbell of a `syscall`, and with some of those among them.
fn code(numbers: &mut Numbers) -> Vec<u8> {
    let length = 1 + numbers.next() % 256;
    let mut code = numbers.bytes(length);
    if numbers.next().is_multiple_of(2) {
        return code;
    }
    for _ in 0..1 + numbers.next() % 4 {
        let at = usize::try_from(numbers.next() % length).unwrap();
        let rax = [0, 1, 1, EXIT, 15][usize::try_from(numbers.next() % 5).unwrap()];
        let call = [&[0xb8], &u32::to_le_bytes(rax)[..], &[0x0f, 0x05]].concat();
        code.splice(at..at, call);
    }
    let mov = |opcode: u8, value: u64| [&[opcode], &u32::try_from(value).unwrap().to_le_bytes()[..]].concat();
    // edi: the doorbell; esi: where there are zeroes, a ring, or garbage; edx: a length; ebx: the heap.
    let buffer = [HEAP, RING_ADDR, 0x10_1000][usize::try_from(numbers.next() % 3).unwrap()];
    [mov(0xbf, 4), mov(0xbe, buffer), mov(0xba, 8), mov(0xbb, HEAP), code].concat()
}

/// Run guests whose code is drawn from this seed, with so many workers that run the same as the main processor.
fn run_drawn(seed: u64, workers: usize) {
    let count = std::env::var("INSTAR_RANDOM_GUESTS").map_or(GUESTS, |count| count.parse().unwrap());
    let canary: Vec<u8> = Numbers(7).bytes(1 << 20);
    leaving_nothing(|| {
        let mut numbers = Numbers(seed);
        for number in 0..count {
            let wake = if workers == 0 { Vec::new() } else { waking(workers) };
            let elf = raw_code(&[wake, code(&mut numbers)].concat());
            let program = spec(&Process, Scenario::Good).with_core(&elf).with_stall_limit(Duration::from_millis(150));
            let started = Instant::now();
            let mut host = TestHost::default();
            let result = Process.acquire(workers).unwrap().run(&program, &mut host);
            assert!(started.elapsed() < Duration::from_secs(20), "{number}: {result:?}");
            let known = [ErrorCode::GuestFault, ErrorCode::GuestStalled, ErrorCode::GuestProtocol];
            let error = result.expect_err("a guest that rang for its end by chance");
            assert!(known.contains(&error.code()), "{number}: {error}");
            assert!(host.outcome.is_none() && host.failure.is_none(), "{number}");
        }
    });
    assert!(canary == Numbers(7).bytes(1 << 20));
}

#[test]
fn random_bytes_leave_an_error_and_nothing_else() {
    run_drawn(0x1257_a1b2, 0);
}

#[test]
fn random_bytes_of_several_processors_leave_no_more() {
    run_drawn(0x2ac3_71d9, 2);
}
