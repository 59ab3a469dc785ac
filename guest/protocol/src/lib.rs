//! Messages between an instar guest and its host, as Rust types.
//!
//! The definition is `proto/guest.proto`; the types are generated from it (see `tests/generated.rs`) and
//! used on both sides.
#![no_std]

extern crate alloc;

#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod generated;

pub use generated::{
    guest_message, CheckResultMessage, CommitConfig, CommitResultMessage, FindingMessage, GuestMessage, LogMessage,
    MapMessage, MapResultMessage, MapRun, PanicMessage, PhaseMessage, PlanMessage, ProgressMessage,
};
pub use prost::Message;
