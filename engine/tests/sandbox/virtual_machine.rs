//! What only a virtual machine has: ports, fault stubs, a supervisor.

use crate::support::{run, run_raw, spec, with_address, TestHost};
use instar::sandbox::kvm::{KvmDevice, Machine};
use instar::sandbox::{Kvm, SandboxError};
use instar_guest_abi::{ErrorCode, SYSTEM_ADDR};
use instar_guest_testmod::Scenario;

#[test]
fn a_device_opened_before_is_enough() {
    let machine = Machine::new(KvmDevice::open(0).unwrap(), &spec(&Kvm, Scenario::Good)).unwrap();
    machine.run(&mut TestHost::default()).unwrap();
}

#[test]
fn other_ports_are_refused() {
    for (scenario, code, part) in [
        (Scenario::UnknownPort, ErrorCode::GuestFault, "general protection fault, rip 0x"),
        (Scenario::PortIn, ErrorCode::GuestProtocol, "`in` from port 0x510"),
        (Scenario::FalseFault, ErrorCode::GuestProtocol, "`out` to unassigned port 0x512"),
    ] {
        let error = run(&Kvm, scenario).1.unwrap_err();
        assert_eq!(error.code(), code, "{scenario:?}");
        assert!(error.to_string().contains(part), "{scenario:?}: {error}");
    }
}

#[test]
fn vector_instructions_work() {
    // vxorps ymm0, ymm0, ymm0; mov dx, PORT_EXIT; out dx, eax
    let report = run_raw(&Kvm, &[0xc5, 0xfc, 0x57, 0xc0, 0x66, 0xba, 0x13, 0x05, 0xef]);
    if std::arch::is_x86_feature_detected!("avx") {
        assert_eq!(report.unwrap().exits, 1);
    } else {
        assert!(matches!(report, Err(SandboxError::GuestFault { vector: 6, .. })), "{report:?}");
    }
}

#[test]
fn a_system_call_leads_nowhere() {
    // Disabled by EFER; a hypervisor that does not honor that goes to the entry point 0, which is not mapped.
    for code in [&[0x0f, 0x05], &[0x0f, 0x34], &[0xcd, 0x80]] {
        let error = run_raw(&Kvm, code).unwrap_err();
        assert!(matches!(error, SandboxError::GuestFault { vector: 6 | 13 | 14, .. }), "{code:x?}: {error}");
    }
}

#[test]
fn the_fault_stubs_cannot_be_called_or_imitated() {
    // mov dx, 0x512; mov al, 14; out dx, al
    let error = run_raw(&Kvm, &[0x66, 0xba, 0x12, 0x05, 0xb0, 14, 0xee]).unwrap_err();
    assert!(error.to_string().contains("a false report of a fault"), "{error}");
    // mov edi, stub; jmp rdi
    let error = run_raw(&Kvm, &with_address(SYSTEM_ADDR + 0x1000, &[0xff, 0xe7])).unwrap_err();
    assert!(error.to_string().contains("page fault executing address 0x2000"), "{error}");
    // Returning from the entry: there is nothing to return to.
    let error = run_raw(&Kvm, &[0xc3]).unwrap_err();
    assert!(error.to_string().contains("page fault executing address 0x0"), "{error}");
}

#[test]
fn ports_beside_the_known_ones_mean_nothing() {
    // mov dx, 0x517; out dx, al: the I/O bitmap lets it through, as part of a 32-bit port.
    let error = run_raw(&Kvm, &[0x66, 0xba, 0x17, 0x05, 0xee]).unwrap_err();
    assert!(error.to_string().contains("`out` to unassigned port 0x517"), "{error}");
    // mov dx, 0x510; out dx, ax
    let error = run_raw(&Kvm, &[0x66, 0xba, 0x10, 0x05, 0x66, 0xef]).unwrap_err();
    assert!(error.to_string().contains("`out` of 2 bytes to port 0x510"), "{error}");
}

#[test]
fn string_output_is_refused() {
    // mov edi -> rsi; mov dx, 0x511; mov ecx, 64; rep outsb
    let code = [0xbe, 0, 0, 0x04, 0, 0x66, 0xba, 0x11, 0x05, 0xb9, 64, 0, 0, 0, 0xf3, 0x6e];
    let error = run_raw(&Kvm, &code).unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestProtocol, "{error}");
}
