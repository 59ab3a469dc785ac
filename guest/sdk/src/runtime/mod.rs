//! The environment of a driver in the guest: heap, panics, memory routines, and block I/O through core's call table. The
//! module's entry calls `init` before anything else.

#[cfg(feature = "guest")]
mod c_heap;
#[cfg(any(feature = "guest", test))]
pub mod memory;
#[cfg(feature = "guest")]
mod services;

#[cfg(feature = "guest")]
pub use services::{heap_free, init, send, GuestIo};
#[cfg(feature = "guest")]
pub(crate) use services::{parallel_begin, parallel_end, processors};
