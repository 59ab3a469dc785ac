//! Messages between an instar guest and its host, as Rust types.
//!
//! The definitions are `proto/*.proto`; the types are generated from them (see `tests/generated.rs`) and used on both
//! sides. What every operation says stands in the crate's root, what only one says in a module with its name.
#![no_std]
#![allow(missing_docs, clippy::all, clippy::pedantic, reason = "the modules are generated")]

extern crate alloc;

#[path = "generated/check.rs"]
pub mod check;
// The generator breaks the derives of an enumeration, and rustfmt would join them.
#[rustfmt::skip]
#[path = "generated/commit.rs"]
pub mod commit;
#[path = "generated/compare.rs"]
pub mod compare;
#[path = "generated/convert.rs"]
pub mod convert;
#[path = "generated/guest.rs"]
mod guest;
#[path = "generated/map.rs"]
pub mod map;
#[path = "generated/rebase.rs"]
pub mod rebase;
#[path = "generated/resize.rs"]
pub mod resize;

pub use guest::{
    end_message, guest_message, EndMessage, FailureMessage, GuestMessage, LogMessage, PanicMessage, PhaseMessage,
    ProgressMessage,
};
pub use prost::Message;
