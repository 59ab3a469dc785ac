//! The resize operation: it lets the format of one image give it another virtual size, and reports.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`). The steps are those of [`instar_guest_sdk::resize`].
#![no_std]

extern crate alloc;

use alloc::boxed::Box;
use alloc::vec::Vec;
use instar_guest_protocol::resize::{Config, Outcome, Plan};
use instar_guest_protocol::Message;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, MemberRole, PlanSummary, DEVICE_OUTPUT};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::resize::{resize, Event, Options, ResizeFailure, Step};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Sink, Source};
use instar_guest_view::{Ancestors, Failed, Opener, Reporter};

/// Resize the image of this operation, and report what came of it.
pub fn run(operation: &Operation<'_>, io: &mut dyn BlockIo, send: &mut dyn FnMut(&[u8])) {
    let mut reporter = Reporter::new(send);
    let resized = resize_image(operation, io, &mut reporter);
    reporter.end(resized.map(|virtual_size| Outcome { virtual_size }));
}

/// The virtual size in bytes that the image has at the end.
fn resize_image(operation: &Operation<'_>, io: &mut dyn BlockIo, reporter: &mut Reporter<'_>) -> Result<u64, Failed> {
    let at = |error| Failed { step: Step::Plan.name(), error };
    let wrong = |text: &str| at(DriverError::new(ErrorCode::GuestProtocol, text));
    let config =
        Config::decode(operation.payload()).map_err(|_| wrong("the configuration of a resize cannot be decoded"))?;
    let mut written = operation.devices(&[MemberRole::Write]);
    let target = written.next().filter(|target| target.device == DEVICE_OUTPUT && written.next().is_none());
    let target = target.ok_or_else(|| wrong("a resize changes one image, on the output device"))?;
    let layers: Vec<&DeviceConfig> = operation.devices(&[MemberRole::Below]).collect();
    let open = |device: &DeviceConfig| -> DriverResult<Box<dyn Source>> {
        Ok(Box::new(operation.format_of(device)?.open_source(device)?))
    };
    let sink = operation.format_of(target).and_then(|format| format.open_sink(target, config.has_backing));
    let mut sink = sink.map_err(at)?;
    // Each can be opened: that is asked now, before the first change. It stays open only once it is needed.
    layers.iter().try_for_each(|device| open(device).map(drop)).map_err(at)?;
    let layers =
        layers.iter().map(|&device| -> (u64, Opener<'_>) { (device.virtual_size, Box::new(move || open(device))) });
    let mut below = Ancestors::when_needed(layers);
    let Config { virtual_size, preallocate, dry_run, .. } = config;
    let old_size = sink.info().virtual_size;
    let options = Options { virtual_size, preallocate, dry_run };
    let resized = resize(io, &mut sink, &mut below, options, &mut |event| match event {
        Event::Planned { new_size, plan } => {
            let PlanSummary { final_length, new_data_clusters, new_metadata_clusters, .. } = plan;
            reporter.event(&Plan { old_size, new_size, final_length, new_data_clusters, new_metadata_clusters });
        }
        Event::Progress(done, total) => reporter.progress(Step::Write.name(), done, total),
    });
    resized.map_err(|ResizeFailure { step, error }| Failed { step: step.name(), error })
}
