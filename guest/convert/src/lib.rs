//! The convert operation: the disk that a chain of layers shows goes into an image that was just created, and that nobody
//! uses before the operation ends.
//!
//! The steps are those of a commit that keeps its overlay; what differs is what they are about. The target reads as zeroes,
//! so zeroes are not written into it, and no layer records anything of it. What is told to the host is what a commit tells.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it (`src/bin`).
#![no_std]

extern crate alloc;

mod nonzero;

use alloc::boxed::Box;
use instar_guest_protocol::commit::event::Kind;
use instar_guest_protocol::commit::{self, Outcome, Plan};
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, MemberRole, DEVICE_OUTPUT};
use instar_guest_sdk::commit::{commit, Commit, CommitFailure, Event, Options, Step};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_guest_view::{Ancestors, Failed, Layers, Reporter};
pub use nonzero::NonZero;

/// Nothing above or below the target changes, and nothing makes it larger: it was created with the size that it needs.
const OPTIONS: Options = Options { keep_overlay: true, dry_run: false, resize_backing: false, bitmaps: false };

/// Convert the view of the images that are read, and report it.
pub fn run(operation: &Operation<'_>, io: &mut dyn BlockIo, send: &mut dyn FnMut(&[u8])) {
    let mut reporter = Reporter::new(send);
    let converted = convert(operation, io, &mut reporter);
    let outcome = converted.map(|outcome| Outcome {
        clusters_committed: outcome.clusters_committed,
        bytes_committed: outcome.bytes_committed,
        overlay_clusters_cleared: 0,
    });
    reporter.end(outcome);
}

fn convert(
    operation: &Operation<'_>,
    io: &mut dyn BlockIo,
    reporter: &mut Reporter<'_>,
) -> Result<instar_guest_sdk::commit::Outcome, Failed> {
    let at = |error| Failed { step: Step::Check.name(), error };
    let layers = Layers::of_group(operation, 0).map_err(at)?;
    if layers.count() == 0 {
        return Err(at(wrong("a conversion needs an image to read")));
    }
    let output = target(operation).map_err(at)?;
    let sink = operation.format_of(output).and_then(|format| format.open_sink(output, false));
    let mut sink = sink.map_err(at)?;
    let mut source: Box<NonZero<'_>> = Box::new(NonZero::new(layers));
    let mut below = Ancestors::new(alloc::vec::Vec::new());
    let mut images = Commit { source: source.as_mut(), sink: &mut sink, below: &mut below };
    let converted = commit(io, &mut images, OPTIONS, &mut |event| report(event, reporter));
    converted.map_err(|CommitFailure { step, error }| Failed { step: step.name(), error })
}

/// The image that is written: one, on the output device.
fn target<'a>(operation: &Operation<'a>) -> DriverResult<&'a DeviceConfig> {
    let mut written = operation.devices(&[MemberRole::Write]);
    let output = written.next().filter(|output| output.device == DEVICE_OUTPUT && written.next().is_none());
    output.ok_or_else(|| wrong("a conversion writes one image, on the output device"))
}

fn wrong(text: &str) -> DriverError {
    DriverError::new(ErrorCode::GuestProtocol, text)
}

fn report(event: Event<'_>, reporter: &mut Reporter<'_>) {
    match event {
        Event::Progress(step, done, total) => reporter.progress(step.name(), done, total),
        // No bitmap is merged, and nothing depends on the target.
        Event::Bitmap(_) | Event::Complete => {}
        Event::Planned(plan) => {
            let plan = Plan {
                clusters: plan.clusters,
                bytes: plan.bytes,
                backing_final_length: plan.sink.final_length,
                new_data_clusters: plan.sink.new_data_clusters,
                new_metadata_clusters: plan.sink.new_metadata_clusters,
                encoded_bytes: plan.encoded_bytes,
            };
            reporter.event(&commit::Event { kind: Some(Kind::Plan(plan)) });
        }
    }
}
