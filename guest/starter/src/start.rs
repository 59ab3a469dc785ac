//! The way from a fresh process to the guest.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "x86-64 only; addresses are checked")]

use crate::calls::{call, call3, exit, number, Errno};
use crate::{bell, capabilities, fault, filter, landlock};
use crate::{MappedRange, Plan, Ring, Step, CODE, DATA, MAX_RANGES, MEMORY, PLAN_MAGIC, READ, TEXT};
use core::arch::{asm, naked_asm};
use instar_guest_abi::{worker_stack_top, GUEST_MEMORY_SIZE, MAX_WORKERS, PAGE_SIZE, STACK_TOP};

/// Behind the last address that a process can have (`TASK_SIZE_MAX` of `asm/page_64_types.h`, four levels of page tables).
const END_OF_MEMORY: usize = (1 << 47) - 4096;
const EINVAL: u32 = 22;

/// Why the guest cannot be started: the step, and the errno.
#[derive(Clone, Copy, Debug)]
struct Failure(Step, Errno);

/// `?` with a step.
trait At<T> {
    fn at(self, step: Step) -> Result<T, Failure>;
}

impl<T> At<T> for Result<T, Errno> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.map_err(|errno| Failure(step, errno))
    }
}

/// What [`prepare`] has found: where the guest begins, with the number of the processor in the upper half, and the end of the
/// memory that signals are delivered on.
#[repr(C)]
pub struct Prepared {
    entry: usize,
    stack: usize,
}

/// Entry of the program (`System V ABI AMD64`, 3.4.1): it ends on a stack that survives what the kernel put beside it.
#[unsafe(naked)]
#[no_mangle]
extern "C" fn instar_module_entry() -> ! {
    naked_asm!(
        "and rsp, -16",
        "call {prepare}",
        "mov rsp, rdx",
        "mov rdi, rax",
        "mov rsi, rdx",
        "call {leave}",
        "ud2",
        prepare = sym prepare,
        leave = sym leave,
    )
}

extern "C" fn prepare() -> Prepared {
    match confine() {
        Ok(version) => say(Ring { port: Step::Done as u32, value: version }),
        Err(failure) => fail(failure),
    }
    match map(wait()) {
        Ok(prepared) => prepared,
        Err(failure) => fail(failure),
    }
}

/// Everything that can be given up before the guest is known. Returns the version of Landlock.
fn confine() -> Result<u32, Failure> {
    const PR_SET_PDEATHSIG: usize = 1;
    const PR_SET_DUMPABLE: usize = 4;
    const PR_SET_NAME: usize = 15;
    const PR_SET_TSC: usize = 26;
    const PR_TSC_SIGSEGV: usize = 2;
    const PR_SET_NO_NEW_PRIVS: usize = 38;
    const SIGKILL: usize = 9;
    const GET_ACTION_AVAIL: usize = 2;
    let name = b"instar-guest\0";
    let action = filter::TRAP;
    // SAFETY: the pointers are valid for their calls; the others take none.
    unsafe {
        // Before Linux 5.8, a program that says nothing of its stack may execute what it may read.
        call3(number::PERSONALITY, 0, 0, 0).at(Step::Process)?;
        call3(number::PRCTL, PR_SET_PDEATHSIG, SIGKILL, 0).at(Step::Process)?;
        // A signal from the terminal is the host's.
        call3(number::SETSID, 0, 0, 0).at(Step::Process)?;
        close_others();
        capabilities::give_up().at(Step::Process)?;
        call3(number::PRCTL, PR_SET_NAME, name.as_ptr() as usize, 0).at(Step::Process)?;
        call3(number::PRCTL, PR_SET_NO_NEW_PRIVS, 1, 0).at(Step::Process)?;
        call3(number::PRCTL, PR_SET_DUMPABLE, 0, 0).at(Step::Process)?;
        call3(number::PRCTL, PR_SET_TSC, PR_TSC_SIGSEGV, 0).at(Step::Process)?;
        call3(number::SECCOMP, GET_ACTION_AVAIL, 0, (&raw const action) as usize).at(Step::Seccomp)?;
    }
    let version = landlock::restrict().at(Step::Landlock)?;
    limit(&[Limit::CoreSize, Limit::FileSize, Limit::Processes, Limit::LockedMemory, Limit::MessageQueues])?;
    Ok(u32::try_from(version).unwrap_or(0))
}

/// Close all descriptors but the three.
///
/// # Safety
/// Nothing uses them.
unsafe fn close_others() {
    const LAST_TRIED: usize = 1 << 16;
    for (first, last) in [(0, MEMORY as usize - 1), (TEXT as usize + 1, u32::MAX as usize)] {
        // SAFETY: the caller's promise.
        let closed = unsafe { call3(number::CLOSE_RANGE, first, last, 0) };
        if closed.is_err() {
            // Linux before 5.9, or a container that does not know the call.
            for descriptor in first..=last.min(LAST_TRIED) {
                // SAFETY: as above.
                let _ = unsafe { call3(number::CLOSE, descriptor, 0, 0) };
            }
        }
    }
}

/// Limits of a process (`asm-generic/resource.h`).
#[derive(Clone, Copy)]
#[repr(usize)]
enum Limit {
    FileSize = 1,
    CoreSize = 4,
    Processes = 6,
    Descriptors = 7,
    LockedMemory = 8,
    AddressSpace = 9,
    MessageQueues = 12,
}

fn limit(limits: &[Limit]) -> Result<(), Failure> {
    let none = [0_u64; 2];
    for limit in limits {
        // SAFETY: the structure is valid for the call.
        unsafe { call3(number::SETRLIMIT, *limit as usize, (&raw const none) as usize, 0) }.at(Step::Process)?;
    }
    Ok(())
}

/// Tell the host. Without one there is nothing to do.
fn say(ring: Ring) {
    // SAFETY: no reference to memory that the host changes exists.
    if !unsafe { bell::ring(ring) } {
        exit(1);
    }
}

/// Tell the host why there will be no guest.
fn fail(Failure(step, errno): Failure) -> ! {
    say(Ring { port: step as u32, value: errno.0 });
    exit(1)
}

/// Wait for the host, which says which processor this is; without one there is nothing to do.
fn wait() -> u8 {
    // SAFETY: as above.
    match unsafe { bell::answer() } {
        Some(processor) => processor,
        None => exit(0),
    }
}

/// Map the guest as the plan says, and set up the signals.
fn map(processor: u8) -> Result<Prepared, Failure> {
    let plan = plan().at(Step::Plan)?;
    let count = usize::try_from(plan.count).unwrap_or(usize::MAX);
    let ranges = plan.ranges.get(..count).ok_or(Failure(Step::Plan, Errno(EINVAL)))?;
    for range in ranges {
        map_range(range).at(Step::Map)?;
    }
    let stack = map_own().at(Step::Map)?;
    // SAFETY: the memory was mapped for this.
    unsafe { fault::handle(stack) }.at(Step::Signals)?;
    let entry = plan.entry as u32 as usize | usize::from(processor) << 32;
    if usize::from(processor) > MAX_WORKERS {
        return Err(Failure(Step::Plan, Errno(EINVAL)));
    }
    Ok(Prepared { entry, stack: stack + fault::STACK_SIZE })
}

/// The plan, where it is mapped until everything else is unmapped that is neither the guest's nor this program's.
fn plan() -> Result<&'static Plan, Errno> {
    // SAFETY: new memory, wherever the kernel puts it: the file's first page, of which any bytes are a plan. The host does not
    // change it any more.
    let plan = unsafe {
        let at = call(number::MMAP, [0, size_of::<Plan>(), PROT_READ, MAP_SHARED, MEMORY as usize, 0])?;
        &*(at as *const Plan)
    };
    if plan.magic == PLAN_MAGIC && plan.count <= MAX_RANGES as u64 {
        Ok(plan)
    } else {
        Err(Errno(EINVAL))
    }
}

const PROT_READ: usize = 1;
const PROT_WRITE: usize = 2;
const PROT_EXEC: usize = 4;
const MAP_SHARED: usize = 1;

fn map_range(range: &MappedRange) -> Result<(), Errno> {
    const MAP_FIXED_NOREPLACE: usize = 0x10_0000;
    let (protection, file) = match range.rights {
        READ => (PROT_READ, MEMORY),
        DATA => (PROT_READ | PROT_WRITE, MEMORY),
        CODE => (PROT_READ | PROT_EXEC, TEXT),
        _ => return Err(Errno(EINVAL)),
    };
    if range.start < PAGE_SIZE || range.start >= range.end || range.end > GUEST_MEMORY_SIZE {
        return Err(Errno(EINVAL));
    }
    let (start, length) = (range.start as usize, (range.end - range.start) as usize);
    let flags = MAP_SHARED | MAP_FIXED_NOREPLACE;
    // SAFETY: nothing of this program is at the guest's addresses, and nothing that is there is replaced.
    let at = unsafe { call(number::MMAP, [start, length, protection, flags, file as usize, start]) }?;
    // Linux before 4.17 takes the address as a hint.
    if at == start {
        Ok(())
    } else {
        Err(Errno(EINVAL))
    }
}

/// Memory for signals, with nothing beside it that could be overwritten.
fn map_own() -> Result<usize, Errno> {
    const MAP_PRIVATE: usize = 2;
    const MAP_ANONYMOUS: usize = 0x20;
    let protection = PROT_READ | PROT_WRITE;
    // SAFETY: new memory, wherever the kernel puts it.
    unsafe { call(number::MMAP, [0, fault::STACK_SIZE, protection, MAP_PRIVATE | MAP_ANONYMOUS, usize::MAX, 0]) }
}

/// Give up the rest, and jump into the guest. `stack` is the end of the memory for signals, which is used until then.
extern "C" fn leave(entry: usize, stack: usize) -> ! {
    if let Err(failure) = give_up(stack) {
        fail(failure);
    }
    let (entry, processor) = (entry as u32 as usize, (entry >> 32) as u64);
    let top = if processor == 0 { STACK_TOP } else { worker_stack_top(processor) };
    // SAFETY: the guest's stack is mapped there, if the plan says so; nothing of this program is used any more. As after a
    // call: the return address, which is 0 and so faults, lies on the stack.
    unsafe {
        asm!(
            "mov rsp, r10", "xor eax, eax", "xor ebx, ebx", "xor ecx, ecx", "xor edx, edx", "xor esi, esi",
            "xor ebp, ebp", "xor r8d, r8d", "xor r9d, r9d", "xor r10d, r10d", "xor r12d, r12d", "xor r13d, r13d",
            "xor r14d, r14d", "xor r15d, r15d", "jmp r11",
            in("r10") top - 8, in("rdi") processor, in("r11") entry, options(noreturn)
        )
    }
}

/// Where this program begins and ends, pages: the linker script knows. Without a relocation, as a reference to the two symbols
/// would be.
fn own() -> (usize, usize) {
    let (start, end);
    // SAFETY: two addresses.
    unsafe {
        asm!("lea {}, [rip + instar_module_start]", "lea {}, [rip + instar_module_end]", out(reg) start, out(reg) end,
            options(pure, nomem, nostack));
    }
    (start, end)
}

fn give_up(stack: usize) -> Result<(), Failure> {
    static PROGRAM: [filter::Instruction; filter::LENGTH] = filter::program();
    const SET_MODE_FILTER: usize = 1;
    let own = own();
    let signals = (stack - fault::STACK_SIZE, stack);
    let (low, high) = if own.0 < signals.0 { (own, signals) } else { (signals, own) };
    let guest = GUEST_MEMORY_SIZE as usize;
    for (start, end) in [(guest, low.0), (low.1, high.0), (high.1, END_OF_MEMORY)] {
        if start < end {
            // SAFETY: none of the guest, of this program and of the stack in use lies there.
            unsafe { call3(number::MUNMAP, start, end - start, 0) }.at(Step::Unmap)?;
        }
    }
    // SAFETY: nothing uses the files any more, which stay mapped.
    unsafe {
        call3(number::CLOSE, MEMORY as usize, 0, 0).at(Step::Unmap)?;
        call3(number::CLOSE, TEXT as usize, 0, 0).at(Step::Unmap)?;
    }
    limit(&[Limit::Descriptors, Limit::AddressSpace])?;
    let filter = Filter { length: filter::LENGTH as u16, program: PROGRAM.as_ptr() };
    // SAFETY: the filter is valid for the call.
    unsafe { call3(number::SECCOMP, SET_MODE_FILTER, 0, (&raw const filter) as usize) }.at(Step::Seccomp)?;
    // The last word of this program: what follows is the guest's, which may say anything. Nobody waits for an answer.
    say(Ring { port: Step::Done as u32, value: 0 });
    Ok(())
}

/// `struct sock_fprog`.
#[repr(C)]
struct Filter {
    length: u16,
    program: *const filter::Instruction,
}
