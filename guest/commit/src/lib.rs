//! The commit operation: it speaks only source and sink, and knows no format.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`).
#![no_std]

extern crate alloc;

mod bitmaps;
mod digest;
mod open;
mod read_back;
mod relinks;
mod run;
mod target;
mod verify;

pub use instar_guest_sdk::commit::{commit, Commit, CommitFailure, Event, Options, Outcome, Plan, Step};
pub use run::run;
