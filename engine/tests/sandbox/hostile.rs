//! Guests that fault, hang or talk nonsense.

use crate::support::{failure, on_both, run, run_raw, with_address};
use instar::sandbox::{Sandbox, SandboxError};
use instar_guest_abi::{
    ErrorCode, CONFIG_END, GUEST_MEMORY_SIZE, OPERATION_CONFIG_ADDR, PAGE_TABLES_ADDR, SYSTEM_ADDR,
};
use instar_guest_testmod::Scenario;
use std::time::Instant;

fn assert_fault(on: &dyn Sandbox, scenario: Scenario, start: &str, place: &str) {
    let error = run(on, scenario).1.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestFault);
    let text = error.to_string();
    assert!(text.starts_with(&format!("guest fault: {start}")), "{text}");
    assert!(text.contains(&format!("({place}")), "{text}");
}

on_both! {
    fn memory_faults_are_reported_with_address_and_place(on) {
        assert_fault(on, Scenario::NullWrite, "page fault writing address 0x0, rip 0x", "test 0.9.1+0x");
        assert_fault(on, Scenario::ConstantWrite, "page fault writing address 0x", "test 0.9.1+0x");
        assert_fault(on, Scenario::TextWrite, "page fault writing address 0x", "test 0.9.1+0x");
        assert_fault(on, Scenario::ConfigWrite, "page fault writing address 0x40000", "test 0.9.1+0x");
        assert_fault(on, Scenario::SystemRead, "page fault reading address 0x1000", "test 0.9.1+0x");
        assert_fault(on, Scenario::HeapExecute, "page fault executing address 0x", "code outside every module");
        assert_fault(on, Scenario::StackOverflow, "stack overflow writing address 0x7f", "test 0.9.1+0x");
    }
}

on_both! {
    fn other_faults_are_named(on) {
        assert_fault(on, Scenario::Divide, "divide error, rip 0x", "test 0.9.1+0x");
        assert_fault(on, Scenario::Privileged, "general protection fault, rip 0x", "test 0.9.1+0x");
    }
}

on_both! {
    fn a_panic_is_reported_with_its_message(on) {
        let error = run(on, Scenario::Panic).1.unwrap_err();
        assert_eq!(error.code(), ErrorCode::GuestPanic);
        let text = error.to_string();
        assert!(text.starts_with("guest panic: on purpose, with the number 42 ("), "{text}");
        assert!(text.contains("test-operation.rs:"), "{text}");
        assert!(text.contains(", in test 0.9.1+0x"), "{text}");
    }
}

on_both! {
    fn an_exhausted_heap_is_a_panic(on) {
        let text = failure(on, Scenario::HeapExhausted);
        assert!(text.starts_with("guest panic: memory allocation of 1048576 bytes failed"), "{text}");
    }
}

on_both! {
    fn a_guest_that_hangs_is_ended(on) {
        let started = Instant::now();
        let error = run(on, Scenario::Stall).1.unwrap_err();
        assert!(matches!(error, SandboxError::GuestStalled { time: 2000..4000, .. }), "{error}");
        assert!(started.elapsed().as_secs() < 60);
    }
}

on_both! {
    fn nonsense_is_a_protocol_error(on) {
        for (scenario, part) in [
            (Scenario::DoorbellCount, "a doorbell for 257 requests"),
            (Scenario::BufferOutside, "a buffer outside the heap"),
            (Scenario::BadMessage, "a message that cannot be decoded"),
            (Scenario::LongMessage, "a message of 1048576 bytes"),
            (Scenario::MessageFlood, "more messages than it may send"),
        ] {
            let error = run(on, scenario).1.unwrap_err();
            assert_eq!(error.code(), ErrorCode::GuestProtocol, "{scenario:?}");
            let text = error.to_string();
            assert!(text.starts_with("the guest broke the protocol: ") && text.contains(part), "{scenario:?}: {text}");
        }
    }
}

on_both! {
    fn nothing_but_its_own_memory_is_reachable(on) {
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
            let error = run_raw(on, &with_address(address, code)).unwrap_err();
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
}

on_both! {
    fn privileged_instructions_fault(on) {
        for code in [
            &[0xf4][..],         // hlt
            &[0x0f, 0x30],       // wrmsr
            &[0x0f, 0x22, 0xd8], // mov cr3, rax
            &[0x0f, 0x01, 0xd1], // xsetbv
            &[0x0f, 0x0b],       // ud2
            &[0xcc],             // int3
            &[0x0f, 0x08],       // invd
            &[0xfa],             // cli
            &[0xe6, 0x80],       // out 0x80, al
        ] {
            let error = run_raw(on, code).unwrap_err();
            assert!(matches!(error, SandboxError::GuestFault { vector: 3 | 6 | 13, .. }), "{code:x?}: {error}");
        }
    }
}
