//! The guest half of the raw plugin as a guest module.
#![no_std]
#![no_main]

instar_guest_sdk::export_format!(instar_raw_driver::Raw);
