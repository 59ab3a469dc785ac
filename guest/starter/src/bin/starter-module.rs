//! The program: everything is in the library.
#![no_std]
#![no_main]

use core::panic::PanicInfo;
use instar_guest_starter as _;

/// A panic is the end; the host sees that the process is gone.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    instar_guest_starter::calls::exit(2)
}
