//! What a fault of the guest becomes: a record for the host, and the end of the process.
//!
//! Each signal that an instruction can raise has one handler, on a stack of its own. It never returns, and all signals are
//! blocked while it runs, so that a second fault is the end. The host uses the same way to ask a guest that makes no progress
//! where it is: it sends `SIGXCPU`.

use crate::calls::{call, call3, exit, number, Errno};
use crate::{bell, FaultRecord, Ring, SENT};
use core::arch::naked_asm;
use instar_guest_abi::{MESSAGE_ADDR, PORT_FAULT};

const SIGILL: usize = 4;
const SIGTRAP: usize = 5;
const SIGBUS: usize = 7;
const SIGFPE: usize = 8;
const SIGSEGV: usize = 11;
const SIGXCPU: usize = 24;
const SIGSYS: usize = 31;
const REPORTED: [usize; 7] = [SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGXCPU, SIGSYS];

/// Bytes of the stack that signals are delivered on: the state of the widest vector registers, several times.
pub const STACK_SIZE: usize = 64 << 10;

/// The kernel's `struct sigaction`.
#[repr(C)]
struct Action {
    handler: unsafe extern "C" fn(usize, *const Information, *const Context) -> !,
    flags: u64,
    restorer: extern "C" fn() -> !,
    mask: u64,
}

/// The kernel's `stack_t`.
#[repr(C)]
struct SignalStack {
    address: usize,
    flags: u32,
    size: usize,
}

/// The head of `siginfo_t`, and its variant for `SIGSYS`.
#[repr(C)]
struct Information {
    signal: i32,
    errno: i32,
    code: i32,
    padding: i32,
    address: u64,
    call: u32,
    architecture: u32,
}

/// `struct ucontext` up to the registers that are wanted (`arch/x86/include/uapi/asm/sigcontext.h`).
#[repr(C)]
struct Context {
    flags: u64,
    link: u64,
    stack: [u64; 3],
    general: [u64; 16],
    rip: u64,
    eflags: u64,
    segments: u64,
    error_code: u64,
    vector: u64,
    old_mask: u64,
    cr2: u64,
}

/// The process returns from no signal.
#[unsafe(naked)]
extern "C" fn never() -> ! {
    naked_asm!("ud2")
}

unsafe extern "C" fn report(signal: usize, information: *const Information, context: *const Context) -> ! {
    // SAFETY: the kernel passes both to a handler that was set up with `SA_SIGINFO`.
    let (information, context) = unsafe { (&*information, &*context) };
    let address = if signal == SIGSYS {
        u64::from(information.call) | u64::from(information.architecture) << 32
    } else {
        context.cr2
    };
    // What a process sent has a code of 0 or less (sigaction(2)).
    let sent = if information.code <= 0 { SENT } else { 0 };
    let record = FaultRecord {
        signal: signal as u64 | sent,
        vector: context.vector,
        error_code: context.error_code,
        address,
        rip: context.rip,
    };
    let ring = Ring { port: PORT_FAULT.into(), value: 0 };
    // SAFETY: the message buffer is mapped there, and the guest that used it does not go on; nobody answers.
    unsafe {
        (MESSAGE_ADDR as *mut FaultRecord).write_volatile(record);
        let _ = bell::ring(ring);
    }
    exit(128 + signal)
}

/// From now on, a fault is reported; every other signal that can be blocked is. `stack` are [`STACK_SIZE`] bytes of memory.
///
/// # Errors
/// The kernel refused.
///
/// # Safety
/// The memory is writable, and used for nothing else once the guest runs.
pub unsafe fn handle(stack: usize) -> Result<(), Errno> {
    const SA_SIGINFO: u64 = 4;
    const SA_RESTORER: u64 = 0x0400_0000;
    const SA_ONSTACK: u64 = 0x0800_0000;
    const SIG_SETMASK: usize = 2;
    const MASK_BYTES: usize = 8;
    let stack = SignalStack { address: stack, flags: 0, size: STACK_SIZE };
    // SAFETY: the structures are valid for the calls; the handler is of the kind that its flags say.
    unsafe {
        call3(number::SIGALTSTACK, (&raw const stack) as usize, 0, 0)?;
        let flags = SA_SIGINFO | SA_RESTORER | SA_ONSTACK;
        let action = Action { handler: report, flags, restorer: never, mask: u64::MAX };
        for signal in REPORTED {
            call(number::RT_SIGACTION, [signal, (&raw const action) as usize, 0, MASK_BYTES, 0, 0])?;
        }
        let blocked = REPORTED.iter().fold(u64::MAX, |mask, signal| mask & !(1 << (signal - 1)));
        call(number::RT_SIGPROCMASK, [SIG_SETMASK, (&raw const blocked) as usize, 0, MASK_BYTES, 0, 0])?;
    }
    Ok(())
}
