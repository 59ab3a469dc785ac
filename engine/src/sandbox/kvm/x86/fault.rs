//! Turns the report of a fault stub into an error.

use super::system;
use crate::sandbox::error::SandboxError;
use crate::sandbox::memory::GuestRam;
use crate::sandbox::placed::Placed;
use crate::sandbox::x86::fault::{vector_name, Fault};

/// The fault `vector`, whose frame is at `stack`, with the fault address `cr2`.
pub fn fault(ram: &GuestRam, modules: &[Placed], vector: u8, stack: u64, cr2: u64) -> SandboxError {
    let (_, has_code) = vector_name(vector);
    let on_stack = |index: u64| {
        let address = stack.checked_add(index * 8).filter(|address| system::STACK.contains(address));
        address.and_then(|address| ram.read_u64(address)).unwrap_or(0)
    };
    let (error_code, rip) = if has_code { (on_stack(0), on_stack(1)) } else { (0, on_stack(0)) };
    Fault { vector, error_code, rip, address: cr2 }.error(modules)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use instar_guest_abi::{STACK_SIZE, STACK_TOP};

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
}
