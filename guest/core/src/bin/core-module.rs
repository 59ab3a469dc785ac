//! The entry of the guest: the host starts the vCPU here, at ring 3.
#![no_std]
#![no_main]

/// Entry of the guest.
#[no_mangle]
pub extern "C" fn instar_module_entry() -> ! {
    // SAFETY: the host starts here once.
    unsafe { instar_guest_core::machine::start() }
}
