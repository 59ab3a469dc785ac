//! An operation that does what its payload says; see [`Scenario`].
#![no_std]
#![no_main]

extern crate alloc;

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::arch::asm;
use core::hint::black_box;
use core::sync::atomic::{AtomicBool, Ordering};
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::{
    check, commit, end_message, EndMessage, FailureMessage, GuestMessage, LogMessage, Message,
};
use instar_guest_sdk::abi::{
    Phase, Request, Ring as Requests, DEVICE_OUTPUT, MESSAGE_ADDR, MESSAGE_SIZE, OPERATION_CONFIG_ADDR, PORT_DOORBELL,
    PORT_FAULT, PORT_MESSAGE, RING_ADDR, RING_CAPACITY, STACK_TOP, SYSTEM_ADDR,
};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{export_operation, log, BlockIo, DriverResult, Extents, ReadBelow, Sink, Source};
use instar_guest_starter::{bell, Ring};
use instar_guest_testmod::{workers, Scenario};

type Send<'a> = &'a mut dyn FnMut(&[u8]);

static CONSTANT: [u8; 64] = [7; 64];

/// Whether this is a process.
static IN_PROCESS: AtomicBool = AtomicBool::new(false);

/// What core does to reach the host, past core.
fn out(port: u16, value: u32) {
    // SAFETY: a test of what the host does with it.
    unsafe {
        if IN_PROCESS.load(Ordering::Relaxed) {
            let _ = bell::ring(Ring { port: port.into(), value }) && bell::wait();
        } else {
            asm!("out dx, eax", in("dx") port, in("eax") value);
        }
    }
}

/// The requests in the ring, as memory that the host reads as well.
fn entries() -> *mut Request {
    RING_ADDR as *mut Request
}

fn write_to(address: u64) {
    // SAFETY: none; the fault is what is tested.
    unsafe { asm!("mov byte ptr [{0}], 1", in(reg) address) };
}

fn message(kind: Kind) -> Vec<u8> {
    GuestMessage { kind: Some(kind) }.encode_to_vec()
}

fn end(send: Send<'_>, outcome: end_message::Outcome) {
    send(&message(Kind::End(EndMessage { outcome: Some(outcome) })));
}

/// Log the text, and succeed with this number.
fn succeed(send: Send<'_>, text: String, clusters_committed: u64) {
    if !text.is_empty() {
        send(&message(Kind::Log(LogMessage { text })));
    }
    let outcome = commit::Outcome { clusters_committed, ..commit::Outcome::default() };
    end(send, end_message::Outcome::Result(outcome.encode_to_vec()));
}

/// Plan a repair of this many leaks.
fn plan_repair(send: Send<'_>, leaks: u64, final_length: u64) {
    let plan = check::Plan { leaks, final_length, ..check::Plan::default() };
    send(&message(Kind::Event(check::Event { kind: Some(check::event::Kind::Plan(plan)) }.encode_to_vec())));
}

fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    if depth == u64::MAX {
        return frame[3];
    }
    recurse(black_box(depth + 1)) + black_box(frame)[5]
}

struct NothingBelow;

impl ReadBelow for NothingBelow {
    fn exists(&self) -> bool {
        false
    }
    fn read(&mut self, _: &mut dyn BlockIo, _: u64, buffer: &mut [u8]) -> DriverResult<()> {
        buffer.fill(0);
        Ok(())
    }
}

fn foreign(operation: &Operation<'_>, io: &mut dyn BlockIo) -> DriverResult<u64> {
    let (overlay, output) = (&operation.members[0].device, &operation.members[1].device);
    let mut source = operation.format_of(overlay)?.open_source(overlay)?;
    let mut sink = operation.format_of(output)?.open_sink(output, false)?;
    let mut extents = Extents::with_room_for(10);
    let size = source.extents(io, 0..overlay.file_length, &mut extents)?;
    sink.plan(io, &extents)?;
    sink.planned(io)?;
    sink.write(io, &extents, &mut NothingBelow)?;
    sink.finish(io)?;
    Ok(size)
}

fn good(io: &mut dyn BlockIo, send: Send<'_>) {
    let mut map = BTreeMap::new();
    for number in 0..1000_u64 {
        map.insert(number * 7919 % 1000, format!("{:.2}", black_box(2.0_f64).sqrt_like(number)));
    }
    let mut buffer = vec![0_u8; 4096];
    let address = buffer.as_mut_ptr() as u64;
    let mut requests: Vec<Request> = (0..600).map(|i| Request::read(0, i * 4096, address, 4096)).collect();
    let clusters = match io.submit(&mut requests) {
        Ok(()) => u64::from(buffer[0]),
        Err(failure) => 1000 + u64::from(failure.errno),
    };
    send(&message(Kind::Log(LogMessage { text: format!("{} entries", map.len()) })));
    succeed(send, map.get(&500).cloned().unwrap_or_default(), clusters);
}

trait SqrtLike {
    fn sqrt_like(self, number: u64) -> f64;
}

impl SqrtLike for f64 {
    fn sqrt_like(self, number: u64) -> f64 {
        self * f64::from(u32::try_from(number).unwrap_or(0)) / 3.0
    }
}

/// Put requests into the ring and ring for `count`, past core and what it checks.
fn ring(requests: &[Request], count: u32) {
    // SAFETY: the ring is mapped there.
    let entries = unsafe { &mut (*(RING_ADDR as *mut Requests)).entries };
    entries.iter_mut().zip(requests).for_each(|(entry, request)| *entry = *request);
    out(PORT_DOORBELL, count);
}

/// Change 512 bytes of a device at `offset`.
fn change(device: u32, offset: u64) {
    let data = vec![0x77_u8; 512];
    ring(&[Request::write(device, offset, data.as_ptr() as u64, 512)], 1);
}

/// Enter a phase, and change a device without flushing it.
fn enter(io: &mut dyn BlockIo, device: u32, phase: Phase) {
    io.enter(phase);
    change(device, 0);
}

/// Send a plan.
fn plan(send: Send<'_>, backing_final_length: u64) {
    let plan = commit::Plan { backing_final_length, ..commit::Plan::default() };
    send(&message(Kind::Event(commit::Event { kind: Some(commit::event::Kind::Plan(plan)) }.encode_to_vec())));
}

/// Ask for more and more of the output, 64 KiB at a time; whatever is refused, go on.
fn grow(request: impl Fn(u64) -> Request) {
    for step in 0..u64::MAX >> 16 {
        ring(&[request(step << 16)], 1);
    }
}

#[allow(clippy::panic, reason = "the panic is what is tested")]
fn run(operation: &Operation<'_>, io: &mut dyn BlockIo, send: Send<'_>) {
    let Some((scenario, in_process)) = Scenario::from_payload(operation.payload()) else { panic!("no such scenario") };
    IN_PROCESS.store(in_process, Ordering::Relaxed);
    match scenario {
        Scenario::Good => good(io, send),
        Scenario::NullWrite => write_to(black_box(0)),
        Scenario::ConstantWrite => write_to(CONSTANT.as_ptr() as u64),
        Scenario::TextWrite => write_to(run as *const () as u64),
        Scenario::ConfigWrite => write_to(OPERATION_CONFIG_ADDR),
        Scenario::SystemRead => {
            // SAFETY: none; the fault is what is tested.
            unsafe { asm!("mov {0}, [{0}]", inout(reg) SYSTEM_ADDR => _) };
        }
        Scenario::HeapExecute => {
            let code = Box::new([0xc3_u8; 16]);
            // SAFETY: none; the fault is what is tested.
            unsafe { asm!("call {0}", in(reg) black_box(code.as_ptr()), clobber_abi("C")) };
        }
        Scenario::Divide => {
            // SAFETY: none; the fault is what is tested.
            unsafe {
                asm!("xor edx, edx", "mov eax, 1", "xor ecx, ecx", "div ecx", out("eax") _, out("ecx") _, out("edx") _)
            };
        }
        Scenario::Privileged => {
            // SAFETY: none; the fault is what is tested.
            unsafe { asm!("mov {0}, cr0", out(reg) _) };
        }
        Scenario::Panic => panic!("on purpose, with the number {}", black_box(42)),
        Scenario::Stall => loop {
            black_box(0);
        },
        Scenario::DoorbellCount => out(PORT_DOORBELL, 257),
        Scenario::UnknownPort => out(0x80, 1),
        Scenario::BufferOutside => {
            // SAFETY: the ring is mapped there; core is past by.
            unsafe { (*(RING_ADDR as *mut Requests)).entries[0] = Request::read(0, 0, STACK_TOP - 4096, 16) };
            out(PORT_DOORBELL, 1);
        }
        Scenario::BadMessage => send(&[0xff; 20]),
        Scenario::LongMessage => out(PORT_MESSAGE, 1 << 20),
        Scenario::StackOverflow => {
            black_box(recurse(0));
        }
        Scenario::PortIn => {
            // SAFETY: a test of what the host does with it.
            unsafe { asm!("in al, dx", in("dx") 0x510_u16, out("al") _) };
        }
        Scenario::FalseFault => out(PORT_FAULT, 14),
        Scenario::HeapExhausted => {
            let mut all = Vec::new();
            loop {
                all.push(vec![1_u8; 1 << 20]);
                black_box(&all);
            }
        }
        Scenario::MessageFlood => loop {
            send(&message(Kind::Log(LogMessage { text: String::from("again") })));
        },
        Scenario::DoorbellFlood => loop {
            let _ = io.flush(0);
        },
        Scenario::Silent => {}
        Scenario::Foreign => match foreign(operation, io) {
            Ok(size) => succeed(send, String::from("foreign"), size),
            Err(error) => panic!("{error}"),
        },
        Scenario::StackBuffer => {
            let mut buffer = [0_u8; 512];
            let result = io.read(0, 0, &mut buffer).and_then(|()| io.write(0, 0, &CONSTANT));
            succeed(send, format!("{result:?}"), u64::from(buffer[511]));
        }
        Scenario::GrowLength => grow(|at| Request::set_length(DEVICE_OUTPUT, at)),
        Scenario::GrowWrite => {
            let data = vec![0x77_u8; 1 << 16];
            grow(|at| Request::write(DEVICE_OUTPUT, at, data.as_ptr() as u64, 1 << 16));
        }
        Scenario::GrowCopy => grow(|at| Request::copy(0, 0, DEVICE_OUTPUT, at, 1 << 16)),
        Scenario::WriteReadOnly => {
            let data = vec![0x77_u8; 512];
            ring(&[Request::write(1, 0, data.as_ptr() as u64, 512)], 1);
        }
        Scenario::ReadAbsent => {
            let mut data = vec![0_u8; 512];
            ring(&[Request::read(7, 0, data.as_mut_ptr() as u64, 512)], 1);
        }
        Scenario::CopyOverflow => ring(&[Request::copy(0, u64::MAX - 511, DEVICE_OUTPUT, 0, 4096)], 1),
        Scenario::DoorbellEmpty => out(PORT_DOORBELL, 0),
        Scenario::RingGarbage => {
            // SAFETY: the ring is mapped there, and any bytes are requests.
            unsafe { core::ptr::write_bytes(RING_ADDR as *mut u8, 0xff, size_of::<Requests>()) };
            out(PORT_DOORBELL, u32::try_from(RING_CAPACITY).unwrap_or(0));
        }
        Scenario::RingMixed => {
            let data = vec![0x77_u8; 512];
            let good = Request::write(DEVICE_OUTPUT, 0, data.as_ptr() as u64, 512);
            ring(&[good, Request { op: 0xdead, flags: u32::MAX, ..good }, good], 3);
        }
        Scenario::LongMessageFlood => loop {
            let most = usize::try_from(MESSAGE_SIZE).unwrap_or(0) - 16;
            send(&message(Kind::Log(LogMessage { text: "x".repeat(most) })));
        },
        Scenario::EmptyMessageFlood => loop {
            send(&message(Kind::Log(LogMessage::default())));
        },
        Scenario::EarlyWrite => change(DEVICE_OUTPUT, 0),
        Scenario::DryRunWrite => {
            plan(send, 1 << 20);
            change(DEVICE_OUTPUT, 0);
        }
        Scenario::LyingPlan => {
            plan(send, u64::MAX);
            enter(io, DEVICE_OUTPUT, Phase::Target);
        }
        Scenario::EarlyOverlay => {
            plan(send, 1 << 20);
            enter(io, DEVICE_OUTPUT, Phase::Target);
            change(0, 8192);
        }
        Scenario::DirtyOverlay => {
            plan(send, 1 << 20);
            enter(io, DEVICE_OUTPUT, Phase::Target);
            enter(io, 0, Phase::Overlay);
        }
        Scenario::FalseSuccess => {
            plan(send, 1 << 20);
            enter(io, DEVICE_OUTPUT, Phase::Target);
            succeed(send, String::new(), 1);
        }
        Scenario::LargeRecord => {
            plan(send, 1 << 20);
            io.enter(Phase::Target);
            change(0, 0);
            change(0, 8192);
        }
        Scenario::WholeCommit => {
            plan(send, 1 << 20);
            io.enter(Phase::Target);
            change(0, 0);
            ring(&[Request::flush(0)], 1);
            change(DEVICE_OUTPUT, 0);
            ring(&[Request::flush(DEVICE_OUTPUT)], 1);
            enter(io, 0, Phase::Overlay);
            ring(&[Request::set_length(0, 512), Request::flush(0)], 2);
            log!("{} bytes are left", 512);
            succeed(send, String::new(), 1);
        }
        Scenario::RepairEarly => {
            plan_repair(send, 1, 0);
            change(DEVICE_OUTPUT, 0);
        }
        Scenario::RepairLyingPlan => {
            plan_repair(send, 1, u64::MAX);
            enter(io, DEVICE_OUTPUT, Phase::Target);
        }
        Scenario::RepairGrow => {
            plan_repair(send, 1, 0);
            io.enter(Phase::Target);
            grow(|at| Request::set_length(DEVICE_OUTPUT, at));
        }
        Scenario::RepairUnflushed => {
            plan_repair(send, 1, 0);
            enter(io, DEVICE_OUTPUT, Phase::Target);
            end(send, end_message::Outcome::Result(check::Outcome::default().encode_to_vec()));
        }
        Scenario::RepairOfNothing => {
            plan_repair(send, 0, 0);
            enter(io, DEVICE_OUTPUT, Phase::Target);
        }
        Scenario::FailureWithoutCode => {
            let failure = FailureMessage { text: String::from("the L1 table"), ..FailureMessage::default() };
            end(send, end_message::Outcome::Failure(failure));
        }
        Scenario::RingWhileServed => {
            ring_while_served();
            succeed(send, String::new(), 1);
        }
        Scenario::AnswersNotTaken => loop {
            // SAFETY: a test of what the host does with it.
            let _ = unsafe { bell::ring(Ring { port: PORT_MESSAGE.into(), value: 8 }) };
        },
        Scenario::WorkersGood => {
            let (all, by_workers, processors) = workers::good();
            succeed(send, format!("{by_workers} items of workers, all {all}"), processors as u64);
        }
        Scenario::ExitWhileWorking => {
            succeed(send, String::new(), 1);
            workers::run(scenario, out);
        }
        Scenario::WorkerScribbles | Scenario::WorkerSwaps => {
            workers::run(scenario, out);
            succeed(send, String::new(), 1);
        }
        Scenario::WorkerRings
        | Scenario::WorkerSends
        | Scenario::WorkerExits
        | Scenario::WorkerWakes
        | Scenario::WorkerJoins
        | Scenario::WorkerFaults
        | Scenario::WorkerStackOverflow
        | Scenario::WorkerStalls
        | Scenario::WorkerPanics
        | Scenario::WorkerAllocates
        | Scenario::WakeTooMany
        | Scenario::WakeNone
        | Scenario::WakeTwice
        | Scenario::WakeFlood
        | Scenario::AllFault => workers::run(scenario, out),
        Scenario::StallAfterRequest => {
            let _ = io.flush(0);
            // SAFETY: the ring is mapped there.
            let entries = unsafe { &mut (*(RING_ADDR as *mut Requests)).entries };
            entries.fill(Request::set_length(DEVICE_OUTPUT, 0));
            loop {
                black_box(0);
            }
        }
    }
    black_box(MESSAGE_ADDR);
}

/// Ring for good requests, and make them bad ones, of another device and of a buffer outside, while they are executed.
fn ring_while_served() {
    let data = vec![0x77_u8; 512];
    let good = Request::write(DEVICE_OUTPUT, 0, data.as_ptr() as u64, 512);
    let bad = [Request::write(1, 0, good.buffer, 512), Request { buffer: STACK_TOP - 512, ..good }];
    for round in 0..2000_usize {
        // SAFETY: the ring is mapped there; the host reads it at the same time, which is what is tested.
        unsafe {
            (0..RING_CAPACITY).for_each(|index| entries().add(index).write_volatile(good));
            let rung = bell::ring(Ring { port: PORT_DOORBELL.into(), value: 2 });
            for index in 0..RING_CAPACITY {
                entries().add(index).write_volatile(bad[(round + index) % 2]);
            }
            if !rung || !bell::wait() {
                return;
            }
        }
    }
}

export_operation!(run);
