//! The guest half of the parallels plugin as a guest module.
#![no_std]
#![no_main]

instar_guest_sdk::export_format!(instar_parallels_driver::Parallels);
