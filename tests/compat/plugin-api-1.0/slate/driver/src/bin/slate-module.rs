//! The guest half as a module.
#![no_std]
#![no_main]

instar_guest_sdk::export_format!(slate_driver::Slate);
