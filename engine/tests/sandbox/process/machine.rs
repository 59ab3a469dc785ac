//! Instructions that tell something of the machine, or change it, without a system call.

use super::code::{assemble, failure, ring, run};
use instar::sandbox::SandboxError;
use instar_guest_abi::PORT_EXIT;

/// Run the code, and ring for the end. `None` if it comes so far, else the vector of its fault.
fn attempt(code: &[u8]) -> Option<u8> {
    match run(&[code, &ring(PORT_EXIT.into(), 0)].concat()) {
        Ok(report) => {
            assert_eq!(report.exits, 1);
            None
        }
        Err(SandboxError::GuestFault { vector, .. }) => Some(vector),
        Err(error) => panic!("{code:x?}: {error}"),
    }
}

#[test]
fn the_clock_is_off() {
    // `PR_SET_TSC` (`prctl(2)`) sets CR4.TSD; performance counters are not open to processes that have none.
    for code in [assemble!("rdtsc"), assemble!("rdtscp"), assemble!("xor ecx, ecx", "rdpmc")] {
        assert_eq!(attempt(code), Some(13), "{code:x?}");
    }
}

#[test]
fn the_tables_of_the_processor_are_not_told() {
    // With UMIP these fault, and the kernel answers the first, second and fourth with values that are the same everywhere
    // (`arch/x86/kernel/umip.c`). Without it the processor tells the addresses.
    if !std::fs::read_to_string("/proc/cpuinfo").unwrap().contains(" umip") {
        eprintln!("not tested: this processor has no UMIP");
        return;
    }
    for (code, low) in [
        (assemble!("sgdt [rsp - 16]", "mov rax, [rsp - 14]"), 0xfffe_0000_u32),
        (assemble!("sidt [rsp - 16]", "mov rax, [rsp - 14]"), 0xffff_0000),
    ] {
        // `ud2` if it is another address.
        let compare = [&[0x3d][..], &low.to_le_bytes(), assemble!("je 3f", "ud2", "3:")].concat();
        let vector = attempt(&[code, &compare].concat());
        assert!(matches!(vector, None | Some(13)), "{code:x?}: {vector:?}");
    }
}

#[test]
fn bases_of_segments_are_the_guests_own() {
    // `wrgsbase` changes what `swapgs` takes from the user, which the kernel does not use. One that is no address is a fault.
    for code in [
        assemble!("mov rax, 0xffffffff81000000", "wrgsbase rax", "wrfsbase rax"),
        assemble!("xor eax, eax", "mov ds, ax", "mov es, ax", "mov fs, ax", "mov gs, ax"),
    ] {
        let vector = attempt(code);
        assert!(matches!(vector, None | Some(6)), "{code:x?}: {vector:?}");
    }
    let vector = attempt(assemble!("mov rax, 1", "shl rax, 62", "wrgsbase rax"));
    assert!(matches!(vector, Some(6 | 13)), "{vector:?}");
    // What is behind such a base is as far away as by any other way.
    let vector = attempt(assemble!("mov rax, 0xffffffff81000000", "wrgsbase rax", "mov rax, gs:[0]"));
    assert!(matches!(vector, Some(6 | 13 | 14)), "{vector:?}");
}

#[test]
fn registers_that_need_a_permission_are_not_there() {
    // Tiles of AMX (`arch_prctl(2)`, `ARCH_REQ_XCOMP_PERM`), the local table, debug registers, user interrupts.
    for code in [
        &[0xc4, 0xe2, 0x78, 0x49, 0x04, 0x25, 0, 0, 4, 0][..], // ldtilecfg [0x40000]
        assemble!("lldt ax"),
        assemble!("mov dr7, rax"),
        assemble!("mov rax, dr0"),
        assemble!("mov rax, cr3"),
        assemble!("xor ecx, ecx", "rdmsr"),
        &[0xf3, 0x0f, 0xc7, 0xf0], // senduipi rax
    ] {
        let vector = attempt(code);
        assert!(matches!(vector, Some(6 | 7 | 13)), "{code:x?}: {vector:?}");
    }
}

#[test]
fn a_hypervisor_below_is_not_asked() {
    // On a rented machine these leave to its hypervisor, which refuses them to ring 3: KVM by -EPERM in `rax`
    // (`kvm_emulate_hypercall`, `arch/x86/kvm/x86.c`), where they are instructions at all.
    const KVM_EPERM: i32 = -1;
    for code in [&[0x0f, 0x01, 0xc1][..], &[0x0f, 0x01, 0xd9]] {
        let call = [assemble!("xor eax, eax", "xor ebx, ebx", "xor ecx, ecx"), code].concat();
        let compare = [&[0x83, 0xf8, KVM_EPERM.to_le_bytes()[0]][..], assemble!("je 3f", "ud2", "3:")].concat();
        let vector = attempt(&[call, compare].concat());
        assert!(matches!(vector, None | Some(6 | 13)), "{code:x?}: {vector:?}");
    }
}

#[test]
fn random_numbers_and_the_name_of_the_processor_are_told() {
    // Not a wall: what a process shares with everybody else on the machine. docs/threat-model.md says so.
    for code in [assemble!("xor eax, eax", "cpuid"), assemble!("xor ecx, ecx", "xgetbv"), assemble!("rdrand rax")] {
        let vector = attempt(code);
        assert!(matches!(vector, None | Some(6)), "{code:x?}: {vector:?}");
    }
    assert!(matches!(failure(assemble!("cpuid", "ud2")), SandboxError::GuestFault { vector: 6, .. }));
}
