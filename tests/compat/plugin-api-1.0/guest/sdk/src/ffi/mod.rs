//! The border between modules: drivers as C tables, and C tables as drivers.
//!
//! A format module turns its [`FormatDriver`](crate::FormatDriver) into tables with
//! `export_format!`; the operation module turns tables back into
//! [`Source`](crate::Source) and [`Sink`](crate::Sink) with [`ForeignFormat`]. Block I/O does not cross the
//! border: each module makes its own, from core's call table.

mod below;
mod export;
mod foreign_format;
mod foreign_sink;
mod foreign_source;
mod operation;
mod sink_shim;
mod source_shim;
mod wire;

pub use export::{descriptor_of_format, descriptor_of_operation, FormatTables};
pub use foreign_format::ForeignFormat;
pub use foreign_sink::ForeignSink;
pub use foreign_source::ForeignSource;
pub use operation::{Operation, OperationFn};
pub use sink_shim::sink_ops;
pub use source_shim::source_ops;

use crate::{DriverError, DriverResult};
use alloc::format;
use instar_guest_abi::{ErrorCode, Failure};

/// Most extents that cross the border in one call.
const MAX_EXTENTS: usize = 1 << 14;

fn protocol(text: &str) -> DriverError {
    DriverError::new(ErrorCode::GuestProtocol, text)
}

/// The module of an image broke a promise of the interface: which module that is, the host knows by the device.
fn protocol_of(device: u32, why: &str) -> DriverError {
    DriverError { device: Some(device), ..protocol(&format!("its driver broke the interface: {why}")) }
}

/// Write an error into the caller's `failure`, if there is one, and return its code.
///
/// # Safety
/// `failure` is null or writable.
unsafe fn store(error: &DriverError, failure: *mut Failure) -> u32 {
    // SAFETY: the caller promises that it is null or writable.
    match unsafe { failure.as_mut() } {
        Some(failure) => error.store(failure),
        None => error.code.number(),
    }
}

/// The code that a table function returns for `result`, after storing its value or error.
///
/// # Safety
/// `out` is valid for writes; `failure` is null or writable.
unsafe fn finish<T>(result: DriverResult<T>, out: *mut T, failure: *mut Failure) -> u32 {
    match result {
        Ok(value) => {
            // SAFETY: the caller promises that `out` is valid for writes.
            unsafe { out.write(value) };
            0
        }
        // SAFETY: passed on from the caller.
        Err(error) => unsafe { store(&error, failure) },
    }
}

/// [`finish`] for a call that has no value.
///
/// # Safety
/// `failure` is null or writable.
unsafe fn done(result: DriverResult<()>, failure: *mut Failure) -> u32 {
    match result {
        Ok(()) => 0,
        // SAFETY: passed on from the caller.
        Err(error) => unsafe { store(&error, failure) },
    }
}

/// Call a table function that reports through a [`Failure`].
fn call(function: impl FnOnce(*mut Failure) -> u32) -> DriverResult<()> {
    let mut failure = Failure::none();
    match function(&raw mut failure) {
        0 => Ok(()),
        code => Err(DriverError::load(&Failure { code, ..failure })),
    }
}
