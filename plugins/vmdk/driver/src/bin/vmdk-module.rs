//! The guest half of the vmdk plugin as a guest module.
#![no_std]
#![no_main]

instar_guest_sdk::export_format!(instar_vmdk_driver::Vmdk);
