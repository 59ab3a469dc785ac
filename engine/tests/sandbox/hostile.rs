//! Guests that fault, hang or talk nonsense.

use crate::support::{failure, run, run_raw};
use instar::sandbox::SandboxError;
use instar_guest_abi::{
    ErrorCode, CONFIG_END, GUEST_MEMORY_SIZE, OPERATION_CONFIG_ADDR, PAGE_TABLES_ADDR, SYSTEM_ADDR,
};
use instar_guest_testmod::Scenario;
use std::time::Instant;

fn assert_fault(scenario: Scenario, start: &str, place: &str) {
    let error = run(scenario).1.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestFault);
    let text = error.to_string();
    assert!(text.starts_with(&format!("guest fault: {start}")), "{text}");
    assert!(text.contains(&format!("({place}")), "{text}");
}

#[test]
fn memory_faults_are_reported_with_address_and_place() {
    assert_fault(Scenario::NullWrite, "page fault writing address 0x0, rip 0x", "test 0.9.1+0x");
    assert_fault(Scenario::ConstantWrite, "page fault writing address 0x", "test 0.9.1+0x");
    assert_fault(Scenario::TextWrite, "page fault writing address 0x", "test 0.9.1+0x");
    assert_fault(Scenario::ConfigWrite, "page fault writing address 0x40000", "test 0.9.1+0x");
    assert_fault(Scenario::SystemRead, "page fault reading address 0x1000", "test 0.9.1+0x");
    assert_fault(Scenario::HeapExecute, "page fault executing address 0x", "code outside every module");
    assert_fault(Scenario::StackOverflow, "stack overflow writing address 0x7f", "test 0.9.1+0x");
}

#[test]
fn other_faults_are_named() {
    assert_fault(Scenario::Divide, "divide error, rip 0x", "test 0.9.1+0x");
    assert_fault(Scenario::UnknownPort, "general protection fault, rip 0x", "test 0.9.1+0x");
    assert_fault(Scenario::Privileged, "general protection fault, rip 0x", "test 0.9.1+0x");
}

#[test]
fn a_panic_is_reported_with_its_message() {
    let error = run(Scenario::Panic).1.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestPanic);
    let text = error.to_string();
    assert!(text.starts_with("guest panic: on purpose, with the number 42 ("), "{text}");
    assert!(text.contains("test-operation.rs:"), "{text}");
    assert!(text.contains(", in test 0.9.1+0x"), "{text}");
}

#[test]
fn an_exhausted_heap_is_a_panic() {
    let text = failure(Scenario::HeapExhausted);
    assert!(text.starts_with("guest panic: memory allocation of 1048576 bytes failed"), "{text}");
}

#[test]
fn a_guest_that_hangs_is_ended() {
    let started = Instant::now();
    let error = run(Scenario::Stall).1.unwrap_err();
    assert!(matches!(error, SandboxError::GuestStalled { time: 2000..4000, .. }), "{error}");
    assert!(started.elapsed().as_secs() < 60);
}

#[test]
fn nonsense_is_a_protocol_error() {
    for (scenario, part) in [
        (Scenario::DoorbellCount, "a doorbell for 257 requests"),
        (Scenario::BufferOutside, "a buffer outside the heap"),
        (Scenario::BadMessage, "a message that cannot be decoded"),
        (Scenario::LongMessage, "a message of 1048576 bytes"),
        (Scenario::PortIn, "`in` from port 0x510"),
        (Scenario::FalseFault, "`out` to unassigned port 0x512"),
        (Scenario::MessageFlood, "more messages than it may send"),
    ] {
        let error = run(scenario).1.unwrap_err();
        assert_eq!(error.code(), ErrorCode::GuestProtocol, "{scenario:?}");
        let text = error.to_string();
        assert!(text.starts_with("the guest broke the protocol: ") && text.contains(part), "{scenario:?}: {text}");
    }
}

#[test]
fn vector_instructions_work() {
    // vxorps ymm0, ymm0, ymm0; mov dx, PORT_EXIT; out dx, eax
    let report = run_raw(&[0xc5, 0xfc, 0x57, 0xc0, 0x66, 0xba, 0x13, 0x05, 0xef]);
    if std::arch::is_x86_feature_detected!("avx") {
        assert_eq!(report.unwrap().exits, 1);
    } else {
        assert!(matches!(report, Err(SandboxError::GuestFault { vector: 6, .. })), "{report:?}");
    }
}

#[test]
fn a_system_call_leads_nowhere() {
    // Disabled by EFER; a hypervisor that does not honour that goes to the entry point 0, which is not mapped.
    for code in [&[0x0f, 0x05], &[0x0f, 0x34]] {
        let error = run_raw(code).unwrap_err();
        assert!(matches!(error, SandboxError::GuestFault { vector: 6 | 13 | 14, .. }), "{code:x?}: {error}");
    }
}

/// `mov edi, ADDRESS` followed by `rest`.
fn with_address(address: u64, rest: &[u8]) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend(u32::try_from(address).unwrap().to_le_bytes());
    code.extend(rest);
    code
}

#[test]
fn nothing_but_its_own_memory_is_reachable() {
    const READ: &[u8] = &[0x8a, 0x07]; // mov al, [rdi]
    const WRITE: &[u8] = &[0xc6, 0x07, 0x01]; // mov byte ptr [rdi], 1
    for (address, code) in [
        (0, READ),
        (SYSTEM_ADDR, READ),
        (SYSTEM_ADDR + 0x3000, WRITE),
        (PAGE_TABLES_ADDR, READ),
        (PAGE_TABLES_ADDR, WRITE),
        (OPERATION_CONFIG_ADDR, WRITE),
        (CONFIG_END, READ),
        (GUEST_MEMORY_SIZE, READ),
        (0xfee0_0000, READ),
    ] {
        let error = run_raw(&with_address(address, code)).unwrap_err();
        let SandboxError::GuestFault { vector: 14, address: Some((at, _)), rip, place, .. } = &error else {
            panic!("{address:#x}: {error}");
        };
        assert_eq!(
            (*at, *rip, place.as_str()),
            (address, 0x10_1005, concat!("core ", env!("CARGO_PKG_VERSION"), "+0x5")),
            "{error}"
        );
    }
}

#[test]
fn privileged_instructions_fault() {
    for code in [
        &[0xf4][..],         // hlt
        &[0x0f, 0x30],       // wrmsr
        &[0x0f, 0x22, 0xd8], // mov cr3, rax
        &[0x0f, 0x01, 0xd1], // xsetbv
        &[0x0f, 0x0b],       // ud2
        &[0xcd, 0x80],       // int 0x80
        &[0xcc],             // int3
        &[0x0f, 0x08],       // invd
        &[0xfa],             // cli
        &[0xe6, 0x80],       // out 0x80, al
    ] {
        let error = run_raw(code).unwrap_err();
        assert!(matches!(error, SandboxError::GuestFault { vector: 3 | 6 | 13, .. }), "{code:x?}: {error}");
    }
}

#[test]
fn the_fault_stubs_cannot_be_called_or_imitated() {
    // mov dx, 0x512; mov al, 14; out dx, al
    let error = run_raw(&[0x66, 0xba, 0x12, 0x05, 0xb0, 14, 0xee]).unwrap_err();
    assert!(error.to_string().contains("a false report of a fault"), "{error}");
    // mov edi, stub; jmp rdi
    let error = run_raw(&with_address(SYSTEM_ADDR + 0x1000, &[0xff, 0xe7])).unwrap_err();
    assert!(error.to_string().contains("page fault executing address 0x2000"), "{error}");
    // Returning from the entry: there is nothing to return to.
    let error = run_raw(&[0xc3]).unwrap_err();
    assert!(error.to_string().contains("page fault executing address 0x0"), "{error}");
}

#[test]
fn ports_beside_the_known_ones_mean_nothing() {
    // mov dx, 0x514; out dx, al: the I/O bitmap lets it through, as part of a 32-bit port.
    let error = run_raw(&[0x66, 0xba, 0x14, 0x05, 0xee]).unwrap_err();
    assert!(error.to_string().contains("`out` to unassigned port 0x514"), "{error}");
    // mov dx, 0x510; out dx, ax
    let error = run_raw(&[0x66, 0xba, 0x10, 0x05, 0x66, 0xef]).unwrap_err();
    assert!(error.to_string().contains("`out` of 2 bytes to port 0x510"), "{error}");
}

#[test]
fn string_output_is_refused() {
    // mov edi -> rsi; mov dx, 0x511; mov ecx, 64; rep outsb
    let code = [0xbe, 0, 0, 0x04, 0, 0x66, 0xba, 0x11, 0x05, 0xb9, 64, 0, 0, 0, 0xf3, 0x6e];
    let error = run_raw(&code).unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestProtocol, "{error}");
}
