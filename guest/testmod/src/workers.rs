//! What workers do, and what is done to them.

use crate::Scenario;
use alloc::vec;
use alloc::vec::Vec;
use core::arch::asm;
use core::hint::{black_box, spin_loop};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use instar_guest_sdk::abi::{
    Request, MESSAGE_ADDR, PORT_DOORBELL, PORT_EXIT, PORT_JOIN, PORT_MESSAGE, PORT_WAKE, RING_ADDR, RING_CAPACITY,
    WORKER_STACKS_ADDR,
};
use instar_guest_sdk::Crew;

/// What the calls of a scenario need: how the host is reached past core.
pub type Out = fn(u16, u32);

static SCENARIO: AtomicU32 = AtomicU32::new(0);
/// A worker is at its item.
static ARRIVED: AtomicBool = AtomicBool::new(false);
/// The main processor is done.
static DONE: AtomicBool = AtomicBool::new(false);

fn is_worker() -> bool {
    let stack: u64;
    // SAFETY: reads one register.
    unsafe { asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack)) };
    stack > WORKER_STACKS_ADDR
}

/// An item: how the host is reached, and a number.
struct Item {
    out: Out,
    number: u64,
}

fn items(out: Out, count: u64) -> Vec<Item> {
    (0..count).map(|number| Item { out, number }).collect()
}

fn wait_for(flag: &AtomicBool) {
    while !flag.load(Ordering::SeqCst) {
        spin_loop();
    }
}

fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    if depth == u64::MAX {
        return frame[3];
    }
    recurse(black_box(depth + 1)) + black_box(frame)[5]
}

fn write_to_nothing() {
    // SAFETY: none; the fault is what is tested.
    unsafe { asm!("mov byte ptr [{0}], 1", in(reg) black_box(0_u64)) };
}

/// Write other bytes to the ring and the message buffer until the main processor is done.
fn scribble() {
    let mut byte = 0_u8;
    while !DONE.load(Ordering::SeqCst) {
        byte = byte.wrapping_add(1);
        for (start, length) in [(RING_ADDR, RING_CAPACITY * size_of::<Request>()), (MESSAGE_ADDR, 64)] {
            for at in 0..length as u64 {
                // SAFETY: both are mapped there; that others use them is what is tested.
                unsafe { ((start + at) as *mut u8).write_volatile(byte) };
            }
        }
    }
}

/// Put other requests over the first of the ring until the main processor is done, and count at the beginning of the buffer that
/// all of them name.
fn swap(buffer: u64) {
    let mut count = 0_u64;
    while !DONE.load(Ordering::SeqCst) {
        for request in [
            Request::write(1, 4096, buffer, 512),
            Request { op: u32::MAX, ..Request::read(u32::MAX, u64::MAX, buffer, u64::MAX) },
            Request::read(0, 0, buffer, 64),
        ] {
            count += 1;
            // SAFETY: both are mapped there; that others use them is what is tested.
            unsafe {
                (RING_ADDR as *mut Request).write_volatile(request);
                (buffer as *mut u64).write_volatile(count);
            }
        }
    }
}

#[allow(clippy::panic, reason = "the panic is what is tested")]
fn misbehave(_: &mut u64, item: &mut Item) {
    let scenario = Scenario::from_u32(SCENARIO.load(Ordering::SeqCst));
    if !is_worker() {
        wait_for(&ARRIVED);
        match scenario {
            Some(Scenario::WakeTwice) => (item.out)(PORT_WAKE, 1),
            Some(Scenario::ExitWhileWorking) => (item.out)(PORT_EXIT, 0),
            Some(Scenario::AllFault) => write_to_nothing(),
            Some(Scenario::WorkerScribbles | Scenario::WorkerSwaps) => {
                for _ in 0..200 {
                    let request = Request::read(0, 0, item.number, 512);
                    // SAFETY: the ring is mapped there.
                    unsafe { (RING_ADDR as *mut Request).write_volatile(request) };
                    (item.out)(PORT_DOORBELL, 1);
                }
                DONE.store(true, Ordering::SeqCst);
            }
            _ => {}
        }
        return;
    }
    ARRIVED.store(true, Ordering::SeqCst);
    match scenario {
        Some(Scenario::WorkerRings) => (item.out)(PORT_DOORBELL, 1),
        Some(Scenario::WorkerSends) => (item.out)(PORT_MESSAGE, 5),
        Some(Scenario::WorkerExits) => (item.out)(PORT_EXIT, 0),
        Some(Scenario::WorkerWakes) => (item.out)(PORT_WAKE, 1),
        Some(Scenario::WorkerJoins) => (item.out)(PORT_JOIN, 0),
        Some(Scenario::WorkerFaults | Scenario::AllFault) => write_to_nothing(),
        Some(Scenario::WorkerStackOverflow) => {
            black_box(recurse(0));
        }
        Some(Scenario::WorkerStalls | Scenario::WakeTwice | Scenario::ExitWhileWorking) => loop {
            spin_loop();
        },
        Some(Scenario::WorkerPanics) => panic!("a worker panics on purpose"),
        Some(Scenario::WorkerAllocates) => drop(black_box(vec![item.number; 100])),
        Some(Scenario::WorkerScribbles) => scribble(),
        Some(Scenario::WorkerSwaps) => swap(item.number),
        _ => {}
    }
}

/// An item of honest work.
struct Piece {
    number: u64,
    by_worker: bool,
}

/// Whether all items were done once, and how many of them by workers; and how many processors there are.
#[must_use]
pub fn good() -> (bool, usize, usize) {
    let mut crew = Crew::new(0_u64, usize::MAX, || Some(0));
    let (mut all, mut by_workers) = (true, 0);
    for _ in 0..20 {
        let mut pieces: Vec<Piece> = (0..64).map(|number| Piece { number, by_worker: false }).collect();
        crew.for_each(&mut pieces, |rounds, piece| {
            *rounds = (0..100_000).fold(0, |sum, round| black_box(sum + round % 2));
            piece.number += *rounds;
            piece.by_worker = is_worker();
        });
        all &= (50_000..).zip(&pieces).all(|(number, piece)| piece.number == number);
        by_workers += pieces.iter().filter(|piece| piece.by_worker).count();
    }
    (all, by_workers, crew.processors())
}

/// Let workers do what the scenario says.
pub fn run(scenario: Scenario, out: Out) {
    SCENARIO.store(scenario as u32, Ordering::SeqCst);
    let mut crew = Crew::new(0_u64, usize::MAX, || Some(0));
    match scenario {
        Scenario::WakeTooMany => out(PORT_WAKE, u32::try_from(crew.processors()).unwrap_or(0)),
        Scenario::WakeNone => out(PORT_WAKE, 0),
        Scenario::WakeFlood => loop {
            out(PORT_WAKE, 1);
            out(PORT_JOIN, 0);
        },
        _ => {
            let buffer = vec![0_u8; 512];
            let mut items = items(out, crew.processors() as u64);
            items.iter_mut().for_each(|item| item.number = buffer.as_ptr() as u64);
            crew.for_each(&mut items, misbehave);
        }
    }
}
