//! Core of a virtual machine: the host starts the vCPU here, at ring 3. It is called through I/O ports.
#![no_std]
#![no_main]

use core::arch::asm;
use instar_guest_core::machine::{help, start, Exit};

/// An `out` to a port, which leaves the virtual machine.
struct Ports;

impl Exit for Ports {
    unsafe fn out(port: u16, value: u32) {
        // SAFETY: the host executes the `out`, and what memory it may change is the caller's promise.
        unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
    }
}

/// Entry of the guest: of the main processor, which is 0, and of each worker.
#[no_mangle]
pub extern "C" fn instar_module_entry(processor: u64) -> ! {
    if processor != 0 {
        help::<Ports>();
    }
    // SAFETY: the host starts here once.
    unsafe { start::<Ports>() }
}
