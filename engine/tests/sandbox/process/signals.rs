//! Faults: the signal that each becomes, the stack that it is handled on, and what the guest can do to both.

use super::code::{assemble, call, failure, ring, run_with, told, wait};
use super::inside::{self, Telling};
use crate::support::with_address;
use instar::sandbox::SandboxError;
use instar_guest_abi::{ErrorCode, MESSAGE_ADDR, PORT_FAULT};
use instar_guest_starter::FaultRecord;

#[test]
fn a_forged_frame_of_a_signal_is_not_returned_to() {
    // `rt_sigreturn` would load all registers from the stack, segments among them; of 32 bits there are two.
    let zeroes =
        assemble!("lea rdi, [rsp - 1024]", "mov ecx, 1024", "xor eax, eax", "rep stosb", "lea rsp, [rsp - 1024]");
    let error = failure(&[zeroes, &call(15)].concat());
    assert!(matches!(error, SandboxError::SystemCall { number: 15, x86_64: true, .. }), "{error}");
    for code in [assemble!("mov eax, 119", "int 0x80"), assemble!("mov eax, 173", "int 0x80")] {
        let error = failure(&[zeroes, code].concat());
        assert!(
            matches!(
                error,
                SandboxError::SystemCall { x86_64: false, .. } | SandboxError::GuestFault { vector: 13, .. }
            ),
            "{error}"
        );
    }
    // Nor by the processor, into a handler that has already returned.
    let error = failure(assemble!("ret"));
    assert!(matches!(error, SandboxError::GuestFault { vector: 14, address: Some((0, "executing")), .. }), "{error}");
}

#[test]
fn every_fault_of_arithmetic_and_flags_is_reported() {
    for (code, vectors) in [
        (assemble!("xor eax, eax", "div eax"), &[0][..]),
        (assemble!("push 0x100", "popfq", "nop", "nop"), &[1]),
        (&[0xf1][..], &[1]), // int1
        (assemble!("int3"), &[3]),
        (assemble!("ud2"), &[6]),
        (assemble!("fninit", "push 0x340", "fldcw [rsp]", "fld1", "fldz", "fdivp", "fwait"), &[16]),
        (
            assemble!(
                "push 0x1d80",
                "ldmxcsr [rsp]",
                "xorps xmm0, xmm0",
                "mov eax, 1",
                "cvtsi2ss xmm1, eax",
                "divss xmm1, xmm0"
            ),
            &[19],
        ),
        (assemble!("push 0x12345678", "ldmxcsr [rsp]"), &[13]),
        (assemble!("mov rax, 1", "shl rax, 62", "jmp rax"), &[13, 14]),
        (assemble!("mov rsp, 1", "shl rsp, 62", "push rax"), &[12, 13]),
    ] {
        let error = failure(code);
        let SandboxError::GuestFault { vector, .. } = error else { panic!("{code:x?}: {error}") };
        assert!(vectors.contains(&vector), "{code:x?}: {vector}");
    }
}

#[test]
fn flags_of_the_guest_do_not_reach_the_handler() {
    // The direction flag is cleared on the way into a handler (`arch/x86/kernel/signal.c`), and single steps end there.
    for code in [assemble!("std", "ud2"), assemble!("push 0x500", "popfq", "ud2")] {
        let error = failure(code);
        assert!(matches!(error, SandboxError::GuestFault { vector: 1 | 6, .. }), "{code:x?}: {error}");
    }
    // That of alignment stays. If the handler met an unaligned address, that would be a second fault, and the end.
    let error = failure(assemble!("push 0x40000", "popfq", "mov eax, [rsp + 1]"));
    assert!(matches!(error, SandboxError::GuestFault { vector: 17, .. } | SandboxError::GuestProtocol(_)), "{error}");
}

#[test]
fn a_stack_that_is_anywhere_is_a_fault_with_its_place() {
    // Gone, in the text, in the ring, in the kernel: the signal has a stack of its own.
    for code in [
        assemble!("xor esp, esp", "push rax"),
        assemble!("mov esp, 0x101800", "push rax"),
        assemble!("mov esp, 0x58000", "ud2"),
        assemble!("mov rsp, 0xffffffff81000000", "push rax"),
    ] {
        let error = failure(code);
        assert!(matches!(error, SandboxError::GuestFault { vector: 14 | 12 | 6, .. }), "{code:x?}: {error}");
    }
}

/// The error of code that begins with the address of the signals' stack in `rbx`.
fn knowing_the_stack(code: &[u8]) -> SandboxError {
    let mut host =
        Telling::new(|child| inside::maps(child).iter().find(|map| map.name.is_empty()).unwrap().range.start);
    let result = run_with(&[&told(), code].concat(), &mut host);
    assert_eq!(host.asked, 1);
    result.unwrap_err()
}

#[test]
fn a_guest_that_knows_the_stack_of_signals_ends_itself_at_most() {
    if !inside::can_look() {
        return;
    }
    // All of it overwritten.
    let error = knowing_the_stack(assemble!("mov rdi, rbx", "mov ecx, 65536", "mov al, 0xff", "rep stosb", "ud2"));
    assert!(matches!(error, SandboxError::GuestFault { vector: 6, .. }), "{error}");
    // As the guest's own stack, at its end and at its beginning, where no frame fits any more.
    let error = knowing_the_stack(assemble!("lea rsp, [rbx + 65536]", "push rax", "ud2"));
    assert!(matches!(error, SandboxError::GuestFault { vector: 6, .. }), "{error}");
    let error = knowing_the_stack(assemble!("lea rsp, [rbx + 1024]", "push rax", "ud2"));
    assert_eq!(error.code(), ErrorCode::GuestProtocol, "{error}");
    assert!(error.to_string().contains("ended by a memory fault (signal 11)"), "{error}");
    // There is nothing beside it, and it cannot be executed.
    for code in [
        assemble!("mov byte ptr [rbx - 1], 1"),
        assemble!("mov byte ptr [rbx + 65536], 1"),
        assemble!("mov byte ptr [rbx], 0xc3", "call rbx"),
    ] {
        let error = knowing_the_stack(code);
        assert!(matches!(error, SandboxError::GuestFault { vector: 14, .. }), "{code:x?}: {error}");
    }
}

#[test]
fn the_starters_own_text_makes_no_other_call() {
    if !inside::can_look() {
        return;
    }
    // An instruction `syscall` of the starter, with a number and arguments of the guest's choice.
    let mut host = Telling::new(|child| {
        let maps = inside::maps(child);
        let text = maps.iter().find(|map| map.rights == "r-xp" && !map.name.is_empty()).unwrap();
        let bytes = inside::memory(child, &text.range);
        let at = bytes.windows(2).position(|pair| pair == [0x0f, 0x05]).unwrap();
        text.range.start + at as u64
    });
    let code = [&told()[..], assemble!("mov eax, 59", "jmp rbx")].concat();
    let error = run_with(&code, &mut host).unwrap_err();
    assert!(matches!(error, SandboxError::SystemCall { number: 59, .. }), "{error}");
    // And it cannot be changed.
    let code = [&told()[..], assemble!("mov byte ptr [rbx], 0x90")].concat();
    let error = run_with(&code, &mut host).unwrap_err();
    assert!(matches!(error, SandboxError::GuestFault { vector: 14, address: Some((_, "writing")), .. }), "{error}");
}

/// The error of a guest that writes this record of a fault itself, and says that it has had one.
fn forged(record: FaultRecord) -> SandboxError {
    let FaultRecord { signal, vector, error_code, address, rip } = record;
    let mut code = with_address(MESSAGE_ADDR, &[]);
    for value in [signal, vector, error_code, address, rip] {
        // movabs rax, VALUE; stosq
        code.extend([&[0x48, 0xb8], &value.to_le_bytes()[..], &[0x48, 0xab]].concat());
    }
    // What it does after that would be another fault, with another record.
    failure(&[code, ring(PORT_FAULT.into(), 0), wait()].concat())
}

#[test]
fn a_false_report_of_a_fault_is_a_lie_about_itself() {
    // Whatever it says, the guest has ended, and by its own fault. In a virtual machine it cannot even say that.
    let fault = FaultRecord { signal: 11, vector: 14, error_code: 6, address: 0x1234, rip: 0x10_1000 };
    let error = forged(fault);
    assert!(
        matches!(error, SandboxError::GuestFault { vector: 14, address: Some((0x1234, "writing")), .. }),
        "{error}"
    );
    let error = forged(FaultRecord { signal: 31, address: u64::MAX, ..fault });
    assert!(matches!(error, SandboxError::SystemCall { number: u32::MAX, name: "without a name", .. }), "{error}");
    for vector in [32, 255, 256, u64::MAX] {
        let error = forged(FaultRecord { vector, ..fault });
        assert_eq!(error.to_string(), "the guest broke the protocol: a false report of a fault");
    }
    for signal in [0, 9, u64::MAX] {
        let error = forged(FaultRecord { signal, ..fault });
        assert_eq!(error.to_string(), "the guest broke the protocol: a false report of a fault");
    }
    assert_eq!(forged(FaultRecord { signal: 24, ..fault }).code(), ErrorCode::SandboxLost);
}
