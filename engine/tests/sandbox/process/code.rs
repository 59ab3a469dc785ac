//! Machine code for guests that have no core: assembled by the compiler, or put together from what a doorbell needs.

use crate::support::{raw_code, spec, TestHost};
use instar::sandbox::{self, Host, Process, Report, SandboxError};
use instar_guest_abi::{Request, RING_ADDR, WORKER_STACKS_ADDR};
use instar_guest_testmod::Scenario;

/// The machine code of these lines, in Intel's syntax; constants may follow a semicolon. The guest runs it at [`START`].
macro_rules! assemble {
    ($($line:expr),+ $(; $($name:ident = $value:expr),+)?) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: the code becomes constant data of the test program, between two labels, whose addresses are taken. Nothing runs it.
        unsafe {
            std::arch::asm!(
                ".pushsection .rodata.guest, \"a\", @progbits",
                "771:",
                $($line,)+
                "772:",
                ".popsection",
                "lea {start_of_code}, [rip + 771b]",
                "lea {end_of_code}, [rip + 772b]",
                $($($name = const $value,)+)?
                start_of_code = out(reg) start,
                end_of_code = out(reg) end,
                options(pure, nomem, nostack, preserves_flags),
            );
            std::slice::from_raw_parts(start, usize::try_from(end.offset_from(start)).unwrap())
        }
    }};
}
pub(super) use assemble;

/// Where the first instruction is.
pub const START: u64 = 0x10_1000;
/// An address in the heap.
pub const HEAP: u64 = WORKER_STACKS_ADDR - (1 << 20);
/// The number of `exit_group`.
pub const EXIT: u32 = 231;

/// `mov eax, NUMBER; syscall`.
pub fn call(number: u32) -> Vec<u8> {
    [&[0xb8], &number.to_le_bytes()[..], &[0x0f, 0x05]].concat()
}

/// End with the lowest byte of `rax`, as it is or negated, as the process's status.
pub fn end_with_result() -> Vec<u8> {
    assemble!("mov edi, eax", "mov eax, 231", "syscall").to_vec()
}

/// Ring on this port, with this value. `rax` is what the call returns.
pub fn ring(port: u32, value: u32) -> Vec<u8> {
    // mov dword ptr [rsp - 16], PORT; mov dword ptr [rsp - 12], VALUE
    let head = [&[0xc7, 0x44, 0x24, 0xf0], &port.to_le_bytes()[..], &[0xc7, 0x44, 0x24, 0xf4], &value.to_le_bytes()];
    let rest = assemble!("lea rsi, [rsp - 16]", "mov edi, 4", "mov edx, 8", "mov eax, 1", "syscall");
    [&head.concat(), rest].concat()
}

/// Wait for an answer.
pub fn wait() -> Vec<u8> {
    assemble!("lea rsi, [rsp - 16]", "mov edi, 4", "mov edx, 1", "xor eax, eax", "syscall").to_vec()
}

/// Put this request first into the ring.
pub fn put(request: Request) -> Vec<u8> {
    let code = assemble!(
        "lea rsi, [rip + 3f]", "mov edi, {ring}", "mov ecx, 64", "rep movsb", "jmp 4f", "3:", ".skip 64", "4:";
        ring = RING_ADDR
    );
    let mut code = code.to_vec();
    let at = code.len() - size_of::<Request>();
    // SAFETY: the structure has no padding (`engine/src/sandbox/plain.rs`), and is all of these bytes.
    let bytes: [u8; size_of::<Request>()] = unsafe { std::mem::transmute(request) };
    code[at..].copy_from_slice(&bytes);
    code
}

/// Ask for 8 bytes, which the host of the test chooses, and take them into `rbx`.
pub fn told() -> Vec<u8> {
    let ask = put(Request::read(0, 0, HEAP, 8));
    let take = assemble!("mov rbx, [{heap}]"; heap = HEAP);
    [&ask[..], &ring(instar_guest_abi::PORT_DOORBELL.into(), 1), &wait(), take].concat()
}

/// Run this code in a process.
pub fn run(code: &[u8]) -> Result<Report, SandboxError> {
    run_with(code, &mut TestHost::default())
}

/// Run this code in a process with this host.
pub fn run_with(code: &[u8], host: &mut dyn Host) -> Result<Report, SandboxError> {
    let elf = raw_code(code);
    sandbox::run(&Process, &spec(&Process, Scenario::Good).with_core(&elf), host)
}

/// Its error.
pub fn failure(code: &[u8]) -> SandboxError {
    run(code).unwrap_err()
}

/// The status that the code ended its process with.
pub fn status(code: &[u8]) -> u8 {
    let error = failure(code).to_string();
    let status = error.strip_prefix("the guest broke the protocol: its process ended with status ");
    status.unwrap_or_else(|| panic!("{error}")).parse().unwrap()
}
