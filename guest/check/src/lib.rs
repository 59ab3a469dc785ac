//! The check operation: it lets the format of one image look at all of its metadata, and reports. It changes nothing.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`).
#![no_std]

extern crate alloc;

use alloc::string::String;
use instar_guest_protocol::check::{Finding, Outcome};
use instar_guest_sdk::abi::{CheckSummary, ErrorCode, FindingKind, MemberRole};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Source};
use instar_guest_view::Reporter;

/// Findings that are sent as text. All are counted.
pub const MAX_FINDINGS: u64 = 200;

/// Check the image that is read, and report what was found.
pub fn run(operation: &Operation<'_>, io: &mut dyn BlockIo, send: &mut dyn FnMut(&[u8])) {
    let mut reporter = Reporter::new(send);
    let examined = open(operation).and_then(|mut source| examine(&mut source, io, &mut reporter));
    reporter.end(examined.map(|found| Outcome {
        image_end_offset: found.image_end_offset,
        total_clusters: found.total_clusters,
        allocated_clusters: found.allocated_clusters,
        fragmented_clusters: found.fragmented_clusters,
        compressed_clusters: found.compressed_clusters,
        corruptions: found.corruptions,
        leaks: found.leaks,
        unused_tail: found.unused_tail,
    }));
}

fn open<'a>(operation: &Operation<'a>) -> DriverResult<impl Source + 'a> {
    let mut devices = operation.devices(&[MemberRole::Read]);
    let device = devices.next().filter(|_| devices.next().is_none());
    let device = device.ok_or_else(|| DriverError::new(ErrorCode::GuestProtocol, "a check is of one image"))?;
    operation.format_of(device)?.open_source(device)
}

/// Examine an image; the first findings are sent as they are found.
///
/// # Errors
/// Those of the source.
pub fn examine(
    source: &mut dyn Source,
    io: &mut dyn BlockIo,
    reporter: &mut Reporter<'_>,
) -> DriverResult<CheckSummary> {
    let mut sent = 0;
    source.check(io, &mut |kind: FindingKind, text: &str| {
        if sent < MAX_FINDINGS {
            sent += 1;
            reporter.event(&Finding { kind: kind as u32, text: String::from(text) });
        }
    })
}
