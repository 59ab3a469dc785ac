//! The convert operation: the disk that a chain of layers shows goes into an image that was just created, and that nobody
//! uses before the operation ends.
//!
//! The steps are those of a commit that keeps its overlay; what differs is what they are about. The target reads as zeroes,
//! so zeroes are not written into it, and no layer records anything of it. What is told to the host is what a commit tells.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it (`src/bin`).
#![no_std]

extern crate alloc;

mod disks;
mod filled;
mod nonzero;
mod salvaged;
mod sparse;

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;
pub use disks::Disks;
pub use filled::Filled;
use instar_guest_protocol::commit::bitmap::Fate as ToldFate;
use instar_guest_protocol::commit::event::Kind;
use instar_guest_protocol::commit::{self, Outcome, Plan};
use instar_guest_protocol::convert::Config;
use instar_guest_protocol::Message;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, MemberRole, DEVICE_OUTPUT};
use instar_guest_sdk::commit::{commit, Commit, CommitFailure, Event, Options, Step};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Fate, MergedBitmap, Sink, Skipped, Source};
use instar_guest_view::{Ancestors, Failed, Filter, Filtered, Layers, Opener, Reporter};
pub use nonzero::NonZero;
pub use salvaged::Salvaged;
pub use sparse::Sparse;

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
    let config = Config::decode(operation.payload());
    let config = config.map_err(|_| at(wrong("the configuration of a conversion cannot be decoded")))?;
    let Config { write_zeroes, allocate, bitmaps, sparse, salvage, new_target } = config;
    let mut disks = disks(operation).and_then(Disks::new).map_err(at)?;
    let salvaged = Rc::new(RefCell::new(Salvaged::default()));
    if salvage {
        disks = disks.salvaging(Rc::clone(&salvaged));
    }
    let output = target(operation).map_err(at)?;
    let parents: Vec<&DeviceConfig> = operation.devices(&[MemberRole::Below]).collect();
    let has_backing = !parents.is_empty();
    let sink = operation.format_of(output).and_then(|format| format.open_sink(output, has_backing));
    let mut sink = sink.map_err(at)?;
    let open = |device: &DeviceConfig| -> DriverResult<Box<dyn Source>> {
        Ok(Box::new(operation.format_of(device)?.open_source(device)?))
    };
    // Each can be opened: that is asked now, before the first change. It stays open only once it is needed.
    parents.iter().try_for_each(|device| open(device).map(drop)).map_err(at)?;
    let parents =
        parents.iter().map(|&device| -> (u64, Opener<'_>) { (device.virtual_size, Box::new(move || open(device))) });
    let mut below = Ancestors::when_needed(parents);
    let size = disks.info().virtual_size;
    let whole = size.checked_next_multiple_of(512).unwrap_or(size).min(sink.info().virtual_size).max(size);
    let mut source: Box<dyn Source + '_> = if write_zeroes || allocate {
        shown(Filled::new(whole, allocate), Box::new(disks))
    } else if has_backing {
        // Zeroes hide what the backing file holds, and holes of a plain file are zeroes.
        Box::new(disks)
    } else {
        shown(NonZero::default(), Box::new(disks))
    };
    if sparse > 0 {
        source = shown(Sparse::new(sparse, !write_zeroes && !has_backing), source);
    }
    // Nothing above or below the target changes, and nothing makes it larger.
    let options = Options { keep_overlay: true, bitmaps, disabled_bitmaps: true, new_target, ..Options::default() };
    let mut images = Commit { source: source.as_mut(), sink: &mut sink, below: &mut below };
    let converted = commit(io, &mut images, options, &mut |event| report(event, reporter));
    for ignored in salvaged.borrow_mut().ignored() {
        reporter.event(&commit::Event { kind: Some(Kind::Ignored(ignored)) });
    }
    for undecoded in salvaged.borrow().parts() {
        reporter.event(&commit::Event { kind: Some(Kind::Undecoded(undecoded)) });
    }
    converted.map_err(|CommitFailure { step, error }| Failed { step: step.name(), error })
}

/// A source behind a filter.
fn shown<'a>(filter: impl Filter + 'a, source: Box<dyn Source + 'a>) -> Box<dyn Source + 'a> {
    Box::new(Filtered::by(filter, source))
}

/// The disks that are read, each a group of layers.
fn disks<'a>(operation: &Operation<'a>) -> DriverResult<Vec<Layers<'a>>> {
    let mut disks = Vec::new();
    loop {
        let layers = Layers::of_group(operation, u32::try_from(disks.len()).unwrap_or(u32::MAX))?;
        if layers.count() == 0 {
            return Ok(disks);
        }
        disks.push(layers);
    }
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
        Event::Bitmap(made) => {
            reporter.event(&commit::Event { kind: Some(Kind::Bitmap(told(made))) });
        }
        // Nothing depends on the target.
        Event::Complete => {}
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

/// A bitmap as the host is told of it.
fn told(made: &MergedBitmap) -> commit::Bitmap {
    let fate = match made.fate {
        Fate::Merged => ToldFate::Merged,
        Fate::Made => ToldFate::Made,
        Fate::Skipped(Skipped::Inconsistent) => ToldFate::Inconsistent,
        Fate::Skipped(Skipped::Disabled) => ToldFate::Disabled,
        Fate::Skipped(Skipped::Interrupted) => ToldFate::Interrupted,
        Fate::Skipped(Skipped::TargetInconsistent) => ToldFate::TargetInconsistent,
        Fate::Skipped(Skipped::TargetDisabled) => ToldFate::TargetDisabled,
    };
    let (name, granularity) = (made.bitmap.name.clone(), made.bitmap.granularity);
    commit::Bitmap { name, granularity, fate: fate.into() }
}
