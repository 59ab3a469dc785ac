//! The rebase operation as a guest module.
#![no_std]
#![no_main]

instar_guest_sdk::export_operation!(instar_guest_rebase::run);
