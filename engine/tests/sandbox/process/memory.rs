//! Memory: what is mapped, with which rights, and how much of it there can be.

use super::code::{assemble, end_with_result, failure, put, ring, run, status, START};
use crate::support::with_address;
use instar::sandbox::SandboxError;
use instar_guest_abi::{Request, PORT_DOORBELL, PORT_EXIT, WORKER_STACKS_ADDR};

#[test]
fn nothing_of_the_host_is_mapped_at_any_address_that_it_uses() {
    static UNIQUE: u64 = 0x1234;
    let on_stack = 0_u8;
    let on_heap = Box::new(1_u8);
    let host: [u64; 4] = [
        (&raw const on_stack) as u64,
        std::ptr::from_ref(&UNIQUE) as u64,
        std::ptr::from_ref(&*on_heap) as u64,
        nothing_of_the_host_is_mapped_at_any_address_that_it_uses as *const () as u64,
    ];
    for address in host {
        // mov rdi, ADDRESS; mov al, [rdi]
        let code = [&[0x48, 0xbf], &address.to_le_bytes()[..], &[0x8a, 0x07]].concat();
        let SandboxError::GuestFault { vector: 14, address: Some((at, "reading")), .. } = failure(&code) else {
            panic!("{address:#x} is mapped")
        };
        assert_eq!(at, address);
    }
}

#[test]
fn data_cannot_be_executed() {
    // mov edi, ADDRESS; jmp rdi: heap, stack, configuration, ring, message buffer.
    for address in [0x3f0_0000, 0xf_0000, 0x4_0000, 0x5_7000, 0x6_0000] {
        let error = failure(&with_address(address, &[0xff, 0xe7]));
        let SandboxError::GuestFault { vector: 14, address: Some((at, "executing")), .. } = error else {
            panic!("{address:#x}: {error}")
        };
        assert_eq!(at, address);
    }
}

#[test]
fn text_cannot_be_written_by_the_kernel_either() {
    const EFAULT: u8 = 14;
    let error = failure(assemble!("mov byte ptr [rip], 0x90"));
    assert!(matches!(error, SandboxError::GuestFault { address: Some((_, "writing")), .. }), "{error}");
    // The answer to a good request, into the text and into the configuration.
    for address in [START, 0x4_0000] {
        let read = assemble!("mov esi, edi", "mov edi, 4", "mov edx, 1", "xor eax, eax", "syscall", "neg eax");
        let code = [
            &put(Request::flush(0))[..],
            &ring(PORT_DOORBELL.into(), 1),
            &with_address(address, read),
            &end_with_result(),
        ];
        assert_eq!(status(&code.concat()), EFAULT, "{address:#x}");
    }
}

#[test]
fn the_stack_does_not_grow() {
    // The last byte of the stack can be written, the one below it not, and neither a page further down.
    run(&[assemble!("mov byte ptr [0x80000], 1"), &ring(PORT_EXIT.into(), 0)].concat()).unwrap();
    for (address, code) in
        [(0x7_ffff, assemble!("mov byte ptr [0x7ffff], 1")), (0x7_eff8, assemble!("mov esp, 0x7f000", "push rax"))]
    {
        let error = failure(code);
        let SandboxError::GuestFault { name: "stack overflow", address: Some((at, "writing")), .. } = error else {
            panic!("{error}")
        };
        assert_eq!(at, address);
    }
}

#[test]
fn all_of_its_memory_is_all_that_there_is() {
    // Fill the heap to the last byte, then ring for the end.
    let fill = assemble!("mov edi, 0x1000000", "mov ecx, {end} - 0x1000000", "mov al, 0xee", "cld", "rep stosb"; end = WORKER_STACKS_ADDR);
    run(&[fill, &ring(PORT_EXIT.into(), 0)].concat()).unwrap();
    // One byte more.
    let error = failure(&[fill, assemble!("stosb")].concat());
    let SandboxError::GuestFault { vector: 14, address: Some((at, "writing")), .. } = error else { panic!("{error}") };
    assert_eq!(at, WORKER_STACKS_ADDR);
}
