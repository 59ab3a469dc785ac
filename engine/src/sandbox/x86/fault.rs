//! What a fault of the processor is called, and where it was (Intel SDM, volume 3, 6.15).

use crate::sandbox::error::SandboxError;
use crate::sandbox::placed::{place, Placed};
use instar_guest_abi::{
    GUEST_MEMORY_SIZE, MESSAGE_ADDR, MESSAGE_SIZE, PAGE_SIZE, STACK_SIZE, STACK_TOP, WORKER_STACKS_ADDR,
    WORKER_STACK_SIZE,
};
use std::ops::Range;

/// The vector of a page fault.
pub const PAGE_FAULT: u8 = 14;
/// The unmapped addresses below the guest's stack.
const BELOW_STACK: Range<u64> = MESSAGE_ADDR + MESSAGE_SIZE..STACK_TOP - STACK_SIZE;

/// Name of a vector, and whether the processor pushes an error code for it.
pub const fn vector_name(vector: u8) -> (&'static str, bool) {
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

/// Whether nothing but the end of a stack leads to this address.
fn below_a_stack(address: u64) -> bool {
    let below_workers = (WORKER_STACKS_ADDR + WORKER_STACK_SIZE..GUEST_MEMORY_SIZE).contains(&address)
        && (address - WORKER_STACKS_ADDR) % WORKER_STACK_SIZE < PAGE_SIZE;
    BELOW_STACK.contains(&address) || below_workers
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

/// What the processor says of a fault.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fault {
    /// The vector.
    pub vector: u8,
    /// The error code, 0 if the vector has none.
    pub error_code: u64,
    /// The instruction.
    pub rip: u64,
    /// CR2: of a page fault the address.
    pub address: u64,
}

impl Fault {
    /// The error that it is.
    pub fn error(self, modules: &[Placed]) -> SandboxError {
        let Self { vector, error_code, rip, address } = self;
        let (name, _) = vector_name(vector);
        // Nothing else is there: functions with large frames probe them page by page.
        let overflow = vector == PAGE_FAULT && below_a_stack(address);
        let name = if overflow { "stack overflow" } else { name };
        let address = (vector == PAGE_FAULT).then(|| (address, access(error_code)));
        SandboxError::GuestFault { vector, name, address, rip, place: place(modules, rip), error_code }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_told_apart() {
        assert_eq!((access(0x4), access(0x7), access(0x15)), ("reading", "writing", "executing"));
    }
}
