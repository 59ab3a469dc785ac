//! The guest half: what walks and writes the metadata, in the sandbox.
//!
//! Replace [`NoSource`] and [`NoSink`] by types that implement `Source` and `Sink`, and open them here.
#![no_std]

use instar_guest_sdk::{FormatDriver, NoSink, NoSource};

/// The {{format}} format.
pub struct Format;

impl FormatDriver for Format {
    type Source = NoSource;
    type Sink = NoSink;
}
