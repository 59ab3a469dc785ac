//! The guest half of the vdi plugin as a guest module.
#![no_std]
#![no_main]

instar_guest_sdk::export_format!(instar_vdi_driver::Vdi);
