//! Turns the report of a fault stub into an error.

use super::system;
use crate::sandbox::error::SandboxError;
use crate::sandbox::memory::GuestRam;
use crate::sandbox::placed::{place, Placed};
use instar_guest_abi::{MESSAGE_ADDR, MESSAGE_SIZE, STACK_SIZE, STACK_TOP};
use std::ops::Range;

const PAGE_FAULT: u8 = 14;
/// The unmapped addresses below the guest's stack.
const BELOW_STACK: Range<u64> = MESSAGE_ADDR + MESSAGE_SIZE..STACK_TOP - STACK_SIZE;

/// Name of a vector, and whether the processor pushes an error code for it.
const fn vector_name(vector: u8) -> (&'static str, bool) {
    match vector {
        0 => ("divide error", false),
        1 => ("debug exception", false),
        2 => ("non-maskable interrupt", false),
        3 => ("breakpoint", false),
        4 => ("overflow", false),
        5 => ("bound range exceeded", false),
        6 => ("invalid opcode", false),
        7 => ("device not available", false),
        8 => ("double fault", true),
        10 => ("invalid task state segment", true),
        11 => ("segment not present", true),
        12 => ("stack-segment fault", true),
        13 => ("general protection fault", true),
        PAGE_FAULT => ("page fault", true),
        16 => ("x87 floating-point error", false),
        17 => ("alignment check", true),
        18 => ("machine check", false),
        19 => ("SIMD floating-point exception", false),
        20 => ("virtualization exception", false),
        21 => ("control protection exception", true),
        29 => ("VMM communication exception", true),
        30 => ("security exception", true),
        _ => ("reserved exception", false),
    }
}

/// What was tried at the address of a page fault.
const fn access(error_code: u64) -> &'static str {
    const WRITE: u64 = 1 << 1;
    const FETCH: u64 = 1 << 4;
    if error_code & FETCH != 0 {
        "executing"
    } else if error_code & WRITE != 0 {
        "writing"
    } else {
        "reading"
    }
}

/// The fault `vector`, whose frame is at `stack`, with the fault address `cr2`.
pub fn fault(ram: &GuestRam, modules: &[Placed], vector: u8, stack: u64, cr2: u64) -> SandboxError {
    let (name, has_code) = vector_name(vector);
    let on_stack = |index: u64| {
        let address = stack.checked_add(index * 8).filter(|address| system::STACK.contains(address));
        address.and_then(|address| ram.read_u64(address)).unwrap_or(0)
    };
    let (error_code, rip) = if has_code { (on_stack(0), on_stack(1)) } else { (0, on_stack(0)) };
    let address = (vector == PAGE_FAULT).then(|| (cr2, access(error_code)));
    // Nothing else is there: functions with large frames probe them page by page.
    let name = if vector == PAGE_FAULT && BELOW_STACK.contains(&cr2) { "stack overflow" } else { name };
    SandboxError::GuestFault { vector, name, address, rip, place: place(modules, rip), error_code }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_frame_is_read_from_the_fault_stack_only() {
        let ram = GuestRam::new().unwrap();
        let modules = [Placed { name: "qcow2".to_owned(), version: "0.1.0".to_owned(), range: 0x10_0000..0x11_0000 }];
        let stack = system::STACK.end - 48;
        assert!(ram.write(stack, &2_u64.to_le_bytes()));
        assert!(ram.write(stack + 8, &0x10_0042_u64.to_le_bytes()));
        assert_eq!(
            fault(&ram, &modules, 14, stack, 0x1234).to_string(),
            "guest fault: page fault writing address 0x1234, rip 0x100042 (qcow2 0.1.0+0x42), error code 0x2"
        );
        assert_eq!(
            fault(&ram, &modules, 6, stack + 8, 0).to_string(),
            "guest fault: invalid opcode, rip 0x100042 (qcow2 0.1.0+0x42), error code 0x0"
        );
        assert_eq!(
            fault(&ram, &modules, 14, stack, STACK_TOP - STACK_SIZE - 8).to_string(),
            "guest fault: stack overflow writing address 0x7fff8, rip 0x100042 (qcow2 0.1.0+0x42), error code 0x2"
        );
        let elsewhere = fault(&ram, &modules, 13, u64::MAX - 8, 0).to_string();
        assert!(elsewhere.contains("rip 0x0 (code outside every module"), "{elsewhere}");
    }

    #[test]
    fn accesses_are_told_apart() {
        assert_eq!((access(0x4), access(0x7), access(0x15)), ("reading", "writing", "executing"));
    }
}
