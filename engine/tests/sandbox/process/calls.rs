//! System calls: by number, by architecture, by the old gates, with other arguments than those of the doorbell.

use super::code::{assemble, call, end_with_result, failure, ring, run, status, EXIT, START};
use instar::sandbox::SandboxError;
use instar_guest_abi::{ErrorCode, PORT_EXIT};

/// `uretprobe` and `uprobe`, which newer kernels do not show to a filter (`kernel/seccomp.c`, `seccomp_uprobe_exception`): made
/// by anybody but their trampolines, the first raises `SIGILL`, and the second fails (`arch/x86/kernel/uprobes.c`), after which
/// the code ends in a fault of its own.
const UNFILTERED: [u32; 2] = [335, 336];
const X32: u32 = 0x4000_0000;

#[test]
fn every_system_call_but_the_doorbells_ends_the_guest() {
    let numbers = (0..600).chain(X32..X32 + 600).chain([u32::MAX, 0x8000_0000]);
    // The end of the process is tried below.
    for number in numbers.filter(|number| *number != EXIT) {
        let error = failure(&call(number));
        if UNFILTERED.contains(&number) && matches!(error, SandboxError::GuestFault { .. }) {
            continue;
        }
        let SandboxError::SystemCall { number: told, x86_64, rip, .. } = &error else { panic!("{number:#x}: {error}") };
        assert_eq!((*told, *x86_64, *rip, error.code()), (number, true, START + 7, ErrorCode::GuestFault), "{error}");
    }
}

#[test]
fn a_system_call_is_named() {
    let error = failure(&call(59)).to_string();
    let place = concat!("core ", env!("CARGO_PKG_VERSION"), "+0x7");
    assert_eq!(error, format!("guest fault: the system call execve (number 59), rip 0x101007 ({place})"));
}

#[test]
fn the_upper_half_of_a_number_hides_nothing() {
    // The kernel and its filter take 32 bits of `rax` (`arch/x86/entry/entry_64.S`, `do_syscall_64`).
    let error = failure(assemble!("movabs rax, {number}", "syscall"; number = 0x1_0000_003b_u64));
    assert!(matches!(error, SandboxError::SystemCall { number: 59, x86_64: true, .. }), "{error}");
}

#[test]
fn calls_of_32_bits_are_none() {
    let error = failure(assemble!("mov eax, 11", "int 0x80"));
    assert!(refused_32(&error, 11), "{error}");
    // The far call through the gate of iBCS2, which has no direct form of 64 bits.
    let error = failure(assemble!("call fword ptr [0x40000]"));
    assert_eq!(error.code(), ErrorCode::GuestFault, "{error}");
}

/// Whether a call of 32 bits met the filter, or, in a kernel without them (`CONFIG_IA32_EMULATION`), a fault.
fn refused_32(error: &SandboxError, wanted: u32) -> bool {
    match error {
        SandboxError::SystemCall { number, x86_64, .. } => *number == wanted && !x86_64,
        SandboxError::GuestFault { vector: 6 | 13, .. } => true,
        _ => false,
    }
}

#[test]
fn a_code_segment_of_32_bits_leads_to_the_same_filter() {
    // `retf` into the user's code segment of 32 bits (`__USER32_CS`, `arch/x86/include/asm/segment.h`). The handler of the signal
    // runs in 64 bits again. `execve` has the number 11 there, and 59 is `oldolduname`; `write` to the doorbell is 4.
    for number in [11, 59, 4, 1, 252] {
        for (gate, code) in [("int 0x80", &[0xcd, 0x80][..]), ("syscall", &[0x0f, 0x05]), ("sysenter", &[0x0f, 0x34])] {
            let enter = assemble!(
                "push 0x23",
                "lea rax, [rip + 3f]",
                "push rax",
                ".byte 0x48, 0xcb",
                "3:",
                ".code32",
                "mov ebx, 4",
                "mov ecx, 0x80000",
                "mov edx, 8",
                "mov ebp, 0x80000",
                ".code64"
            );
            let mov = [&[0xb8], &u32::to_le_bytes(number)[..]].concat();
            let error = failure(&[enter, &mov, code].concat());
            assert!(refused_32(&error, number), "{gate} {number}: {error}");
        }
    }
}

#[test]
fn other_segments_are_not_there() {
    // The kernel's, the thread's own, one of a local table, none.
    // What a return to another ring would read of the stack is there.
    let room = assemble!("sub rsp, 64");
    for selector in [0x10_u8, 0x18, 0x33 + 8, 0x43, 0x0f, 0x07, 0x03, 0] {
        let code =
            [room, &[0x6a, selector], assemble!("lea rax, [rip + 3f]", "push rax", ".byte 0x48, 0xcb", "3:", "nop")];
        let error = failure(&code.concat());
        assert!(matches!(error, SandboxError::GuestFault { vector: 11 | 13, .. }), "{selector:#x}: {error}");
    }
    // Into ring 0 by `iretq`, and by the other instructions that return to a less privileged one.
    let to_ring_0 = assemble!("push 0x18", "push rsp", "pushfq", "push 0x10", "lea rax, [rip]", "push rax", "iretq");
    for code in [to_ring_0, assemble!("sysretq"), assemble!("sysexit"), assemble!("swapgs")] {
        let error = failure(code);
        assert!(matches!(error, SandboxError::GuestFault { vector: 6 | 13, .. }), "{code:x?}: {error}");
    }
}

#[test]
fn every_interrupt_is_a_fault() {
    for vector in (0..=u8::MAX).filter(|vector| *vector != 0x80) {
        let error = failure(&[0xcd, vector]);
        let known = match vector {
            3 => matches!(error, SandboxError::GuestFault { vector: 3, .. }),
            4 => matches!(error, SandboxError::GuestFault { vector: 4, .. }),
            _ => matches!(error, SandboxError::GuestFault { vector: 13, .. }),
        };
        assert!(known, "int {vector:#x}: {error}");
    }
}

#[test]
fn the_doorbell_takes_a_ring_and_nothing_else() {
    // The upper halves of descriptor and length count, too.
    let attempt = |number: u32, descriptor: u64, length: u64| {
        // movabs rdi, DESCRIPTOR; mov esi, 0x40000; movabs rdx, LENGTH
        let head =
            [&[0x48, 0xbf], &descriptor.to_le_bytes()[..], &[0xbe, 0, 0, 4, 0, 0x48, 0xba], &length.to_le_bytes()];
        failure(&[head.concat(), call(number)].concat())
    };
    const HIGH: u64 = 1 << 32;
    for (number, descriptor, length) in [
        (1, 4, 7),
        (1, 4, 9),
        (1, 4, 0),
        (1, 4, 8 | HIGH),
        (1, 4 | HIGH, 8),
        (1, 1, 8),
        (1, 2, 8),
        (1, 3, 8),
        (1, 5, 8),
        (1, u64::MAX, 8),
        (0, 4, 8),
        (0, 4, 1 | HIGH),
        (0, 3, 1),
        (0, 0, 1),
    ] {
        let error = attempt(number, descriptor, length);
        assert!(matches!(error, SandboxError::SystemCall { .. }), "{number} {descriptor} {length}: {error}");
    }
    // The configuration's magic is no port.
    let error = attempt(1, 4, 8);
    assert!(error.to_string().contains("`out` to unassigned port 0x"), "{error}");
}

#[test]
fn a_second_thread_or_process_cannot_be_made() {
    // clone, fork, vfork, clone3, execve, execveat: also without arguments that would fail by themselves. What is left of the
    // doorbell works beside them: the code before the call runs.
    for number in [56, 57, 58, 435, 59, 322] {
        let share_everything =
            assemble!("mov edi, 0x10f00", "lea rsi, [rsp - 4096]", "xor edx, edx", "xor r10d, r10d", "xor r8d, r8d");
        let error = failure(&[share_everything, &call(number)].concat());
        assert!(matches!(error, SandboxError::SystemCall { number: told, .. } if told == number), "{number}: {error}");
    }
}

#[test]
fn old_system_calls_in_the_kernels_page_meet_the_filter() {
    // gettimeofday, time, getcpu: what a process cannot unmap, and what would tell the time (`vsyscall_64.c`).
    for entry in [0_u32, 0x400, 0x800] {
        let code = [&[0x48, 0xc7, 0xc0], &(0xff60_0000_u32 + entry).to_le_bytes()[..], &[0xff, 0xd0]].concat();
        let error = failure(&code);
        let refused = match error {
            SandboxError::SystemCall { number, .. } => [96, 201, 309].contains(&number),
            SandboxError::GuestFault { vector: 13 | 14, .. } => true,
            _ => false,
        };
        assert!(refused, "{entry:#x}: {error}");
    }
    let error = failure(assemble!("mov rax, [0xffffffffff600000]"));
    assert!(matches!(error, SandboxError::GuestFault { vector: 14, .. }), "{error}");
}

#[test]
fn an_end_without_a_result_is_told() {
    assert_eq!(status(assemble!("mov edi, 7", "mov eax, 231", "syscall")), 7);
    // `exit` ends a thread: there is no use for it.
    assert!(matches!(failure(&call(60)), SandboxError::SystemCall { number: 60, .. }));
}

#[test]
fn what_the_doorbell_says_of_an_address_is_an_errno() {
    const EFAULT: u8 = 14;
    // The kernel's text, a gap of the guest, an address that is none: the last two differ from a fault in that the guest lives on
    // to look elsewhere. There is nothing to find.
    for address in [0xffff_ffff_8100_0000, 0x3_0000, 1 << 63, 0xffff_ffff_ff60_0000_u64] {
        let head = [&[0x48, 0xbe], &address.to_le_bytes()[..]].concat();
        let write = assemble!("mov edi, 4", "mov edx, 8", "mov eax, 1", "syscall", "neg eax");
        assert_eq!(status(&[&head, write, &end_with_result()].concat()), EFAULT, "{address:#x}");
    }
    // And what can be read is rung, and is no port, or is one.
    run(&ring(PORT_EXIT.into(), 0)).unwrap();
}
