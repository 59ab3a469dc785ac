//! What only a process has: system calls, what is mapped beside the guest, signals, a host that is not alone with the memory.

use crate::support::{run, run_raw, spec, with_address, TestHost};
use instar::sandbox::{self, Process, SandboxError};
use instar_guest_abi::ErrorCode;
use instar_guest_testmod::Scenario;
use std::time::Instant;

/// `mov eax, NUMBER`, then `instruction`.
fn call(number: u32, instruction: &[u8]) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(number.to_le_bytes());
    code.extend(instruction);
    code
}

const SYSCALL: &[u8] = &[0x0f, 0x05];

#[test]
fn every_system_call_but_the_doorbells_ends_the_guest() {
    /// `uretprobe` and `uprobe`, which newer kernels do not show to a filter: made by anybody but their trampolines, the first
    /// raises `SIGILL`, and the second fails (`arch/x86/kernel/uprobes.c`), after which the code ends in a fault of its own.
    const UNFILTERED: [u32; 2] = [335, 336];
    const X32: u32 = 0x4000_0000;
    let numbers = (0..600).chain(X32..X32 + 600).chain([u32::MAX, 0x8000_0000]);
    // The end of the process is tried below.
    for number in numbers.filter(|number| *number != 231) {
        let error = run_raw(&Process, &call(number, SYSCALL)).unwrap_err();
        if UNFILTERED.contains(&number) && matches!(error, SandboxError::GuestFault { .. }) {
            continue;
        }
        let SandboxError::SystemCall { number: told, x86_64, rip, .. } = &error else { panic!("{number:#x}: {error}") };
        assert_eq!((*told, *x86_64, *rip, error.code()), (number, true, 0x10_1007, ErrorCode::GuestFault), "{error}");
    }
}

#[test]
fn a_system_call_is_named() {
    let error = run_raw(&Process, &call(59, SYSCALL)).unwrap_err().to_string();
    let place = concat!("core ", env!("CARGO_PKG_VERSION"), "+0x7");
    assert_eq!(error, format!("guest fault: the system call execve (number 59), rip 0x101007 ({place})"));
}

#[test]
fn calls_of_32_bits_and_old_gates_are_none() {
    // int 0x80, as `execve` of 32 bits.
    let error = run_raw(&Process, &call(11, &[0xcd, 0x80])).unwrap_err();
    assert!(matches!(error, SandboxError::SystemCall { number: 11, x86_64: false, .. }), "{error}");
    // sysenter; a far call through the gate of 32 bits (`lcall 7,0` has no direct form of 64 bits): faults.
    for code in [&[0x0f, 0x34][..], &[0xff, 0x1c, 0x25, 0, 0, 0x04, 0]] {
        let error = run_raw(&Process, code).unwrap_err();
        assert!(
            matches!(error, SandboxError::SystemCall { x86_64: false, .. } | SandboxError::GuestFault { .. }),
            "{code:x?}: {error}"
        );
    }
}

#[test]
fn the_doorbell_takes_a_ring_and_nothing_else() {
    // xor edi, edi; mov dil, DESCRIPTOR; mov esi, 0x40000; mov edx, LENGTH; mov eax, NUMBER; syscall
    let attempt = |number: u32, descriptor: u8, length: u32| {
        let mut code = vec![0x31, 0xff, 0x40, 0xb7, descriptor, 0xbe, 0, 0, 4, 0, 0xba];
        code.extend(length.to_le_bytes());
        code.extend(call(number, SYSCALL));
        run_raw(&Process, &code).unwrap_err()
    };
    for (number, descriptor, length) in
        [(1, 4, 7), (1, 4, 9), (1, 4, 0), (1, 1, 8), (1, 2, 8), (1, 3, 8), (0, 4, 8), (0, 3, 1)]
    {
        let error = attempt(number, descriptor, length);
        assert!(matches!(error, SandboxError::SystemCall { .. }), "{number} {descriptor} {length}: {error}");
    }
    // The configuration's magic is no port.
    let error = attempt(1, 4, 8);
    assert!(error.to_string().contains("`out` to unassigned port 0x"), "{error}");
}

#[test]
fn an_end_without_a_result_is_told() {
    // mov edi, 7; mov eax, exit_group; syscall
    let mut code = vec![0xbf, 7, 0, 0, 0];
    code.extend(call(231, SYSCALL));
    let error = run_raw(&Process, &code).unwrap_err();
    assert_eq!(error.to_string(), "the guest broke the protocol: its process ended with status 7");
}

#[test]
fn nothing_of_the_host_is_mapped_at_any_address_that_it_uses() {
    let on_stack = 0_u8;
    let host: [u64; 4] = [
        (&raw const on_stack) as u64,
        std::ptr::from_ref(&UNIQUE) as u64,
        Box::into_raw(Box::new(1_u8)) as u64,
        nothing_of_the_host_is_mapped_at_any_address_that_it_uses as *const () as u64,
    ];
    static UNIQUE: u64 = 0x1234;
    for address in host {
        // mov rdi, ADDRESS; mov al, [rdi]
        let mut code = vec![0x48, 0xbf];
        code.extend(address.to_le_bytes());
        code.extend([0x8a, 0x07]);
        let error = run_raw(&Process, &code).unwrap_err();
        let SandboxError::GuestFault { vector: 14, address: Some((at, "reading")), .. } = error else {
            panic!("{error}")
        };
        assert_eq!(at, address);
    }
}

#[test]
fn the_clock_and_what_the_kernel_maps_are_gone() {
    // rdtsc; rdtscp
    for code in [&[0x0f, 0x31][..], &[0x0f, 0x01, 0xf9]] {
        let error = run_raw(&Process, code).unwrap_err();
        assert!(matches!(error, SandboxError::GuestFault { vector: 13, .. }), "{code:x?}: {error}");
    }
    // mov rax, 0xffffffffff600000; call rax: the page of old system calls, which a process cannot unmap.
    let code = [0x48, 0xc7, 0xc0, 0, 0, 0x60, 0xff, 0xff, 0xd0];
    let error = run_raw(&Process, &code).unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestFault, "{error}");
}

#[test]
fn text_cannot_be_written_and_data_not_executed() {
    // mov edi, ADDRESS; jmp rdi: heap, stack, configuration, ring, message buffer.
    for address in [0x3f0_0000, 0xf_0000, 0x4_0000, 0x5_7000, 0x6_0000] {
        let error = run_raw(&Process, &with_address(address, &[0xff, 0xe7])).unwrap_err();
        let SandboxError::GuestFault { vector: 14, address: Some((at, "executing")), .. } = error else {
            panic!("{address:#x}: {error}")
        };
        assert_eq!(at, address);
    }
}

#[test]
fn a_stack_that_is_gone_is_a_fault() {
    // xor esp, esp; push rax: the signal has a stack of its own.
    let error = run_raw(&Process, &[0x31, 0xe4, 0x50]).unwrap_err();
    assert!(matches!(error, SandboxError::GuestFault { vector: 14 | 12, .. }), "{error}");
}

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
    let error = run(&Process, Scenario::AnswersNotTaken).1.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestProtocol, "{error}");
    assert!(started.elapsed().as_secs() < 30);
}
