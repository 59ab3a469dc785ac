//! The guest half of the vhd plugin as a guest module.
#![no_std]
#![no_main]

instar_guest_sdk::export_format!(instar_vhd_driver::Vhd);
