//! Core of the process sandbox: the [starter](instar_guest_starter) jumps here once nothing but the doorbell leads out.
#![no_std]
#![no_main]

use core::hint::spin_loop;
use instar_guest_core::machine::{help, start, Exit};
use instar_guest_starter::{bell, Ring};

/// A message on the doorbell, and the host's answer to it.
struct Doorbell;

impl Exit for Doorbell {
    unsafe fn out(port: u16, value: u32) {
        // SAFETY: in the guest's process; what memory the host may change is the caller's promise.
        let done = unsafe { bell::ring(Ring { port: port.into(), value }) && bell::wait() };
        // Without a host there is nothing left to do: it ends this process.
        while !done {
            spin_loop();
        }
    }
}

/// Entry of the guest: of the main processor, which is 0, and of each worker.
#[no_mangle]
pub extern "C" fn instar_module_entry(processor: u64) -> ! {
    if processor != 0 {
        help::<Doorbell>();
    }
    // SAFETY: the starter jumps here once.
    unsafe { start::<Doorbell>() }
}
