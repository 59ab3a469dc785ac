//! Entry point, call table and heap of the instar guest.
//!
//! The library is what can be tested on the host; the binary `core-module` puts it at the addresses of the guest.
//! With the feature `guest` it is the one module that knows ports and addresses; every other module reaches
//! the host through the [`CallTable`](instar_guest_abi::CallTable) that this one makes.
#![no_std]

extern crate alloc;

mod batch;
mod heap;
mod job;
mod message;
mod start;

#[cfg(feature = "guest")]
pub mod machine;

pub use batch::{submit, Doorbell};
pub use heap::Heap;
pub use job::Job;
pub use message::encode_panic;
pub use start::{check_configuration, check_descriptor, module_name, StartError};
