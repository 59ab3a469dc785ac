//! The guest half of the vhdx plugin as a guest module.
#![no_std]
#![no_main]

instar_guest_sdk::export_format!(instar_vhdx_driver::Vhdx);
