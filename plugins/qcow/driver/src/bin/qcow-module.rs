//! The guest half of the qcow plugin as a guest module.
#![no_std]
#![no_main]

instar_guest_sdk::export_format!(instar_qcow_driver::Qcow);
