//! The rebase operation: an image gets another one below it, and reads what it read. Group 0 is what is below it now, group 1
//! what will be; a layer of both is one device.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`).
#![no_std]

extern crate alloc;

use alloc::boxed::Box;
use alloc::vec::Vec;
use instar_guest_protocol::rebase::{Config, Outcome, Parent as Wanted, Plan};
use instar_guest_protocol::Message;
use instar_guest_sdk::abi::{
    DeviceConfig, ErrorCode, FileDevice, FileList, ImageId, MemberRole, PlanSummary, DEVICE_OUTPUT,
};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::rebase::{rebase, Content, Rebase, RebaseFailure, Step};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Parent, Source};
use instar_guest_view::{Ancestors, Differences, Failed, Opener, Reporter, View};

/// The group of the images that are below the overlay now.
const OLD: u32 = 0;
/// The group of those that are to be below it.
const NEW: u32 = 1;

/// Run the rebase that the host asked for, and report it.
pub fn run(operation: &Operation<'_>, io: &mut dyn BlockIo, send: &mut dyn FnMut(&[u8])) {
    let mut reporter = Reporter::new(send);
    let done = run_rebase(operation, io, &mut reporter);
    reporter.end(done);
}

fn wrong(text: &str) -> DriverError {
    DriverError::new(ErrorCode::GuestProtocol, text)
}

/// The parent that the image is to record.
fn parent(wanted: &Wanted) -> DriverResult<Parent<'_>> {
    let identity = match wanted.identity.as_slice() {
        [] => None,
        bytes => Some(ImageId::new(bytes).ok_or_else(|| wrong("the identity of the new parent is too long"))?),
    };
    if wanted.name.is_empty() {
        return Err(wrong("a new parent without a name"));
    }
    Ok(Parent { name: &wanted.name, format: &wanted.format, identity, virtual_size: wanted.virtual_size })
}

fn open<'a>(operation: &Operation<'a>, device: &DeviceConfig) -> DriverResult<Box<dyn Source + 'a>> {
    Ok(Box::new(operation.format_of(device)?.open_source(device)?))
}

/// An image whose files may be longer than they were, because it was written to.
fn as_it_is(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<DeviceConfig> {
    let mut files = Vec::new();
    for file in device.files.as_slice() {
        files.push(FileDevice { file_length: io.length(file.device)?, ..*file });
    }
    // They live as long as the guest: it is asked for twice at most.
    let files = FileList::of(files.leak());
    Ok(DeviceConfig { file_length: io.length(device.device)?, files, ..*device })
}

/// The images of a group, the top-most first.
fn view<'a>(operation: &Operation<'a>, group: u32) -> DriverResult<View<'a>> {
    let devices = operation.devices_of_group(group, &[MemberRole::Below]);
    let layers = devices.map(|device| Ok((device.device, open(operation, device)?)));
    Ok(View::new(layers.collect::<DriverResult<Vec<_>>>()?))
}

fn run_rebase(operation: &Operation<'_>, io: &mut dyn BlockIo, reporter: &mut Reporter<'_>) -> Result<Outcome, Failed> {
    let at = |error| Failed { step: Step::Check.name(), error };
    let config = Config::decode(operation.payload());
    let config = config.map_err(|_| at(wrong("the configuration of a rebase cannot be decoded")))?;
    let parent = config.parent.as_ref().map(parent).transpose().map_err(at)?;
    let mut written = operation.devices(&[MemberRole::Write]);
    let overlay = written.next().filter(|overlay| overlay.device == DEVICE_OUTPUT && written.next().is_none());
    let overlay = overlay.ok_or_else(|| at(wrong("a rebase is of one image, on the output device")))?;
    let opener = |io: &mut dyn BlockIo| open(operation, &as_it_is(io, overlay)?);
    let total = overlay.virtual_size;

    let old = || operation.devices_of_group(OLD, &[MemberRole::Below]);
    let mut parts = if config.unsafe_mode {
        None
    } else {
        let views = view(operation, OLD).and_then(|old| Ok((old, view(operation, NEW)?)));
        let (before, after) = views.map_err(at)?;
        let source = open(operation, overlay).map_err(at)?;
        // One without a backing file would leave out zeroes that the new one is not to show.
        let has_backing = parent.is_some() || old().next().is_some();
        let sink = operation.format_of(overlay).and_then(|format| format.open_sink(overlay, has_backing));
        let layers = old()
            .map(|device| -> (u64, Opener<'_>) { (device.virtual_size, Box::new(move || open(operation, device))) });
        let below = Ancestors::when_needed(layers);
        Some((Differences::new(source, before, after), sink.map_err(at)?, below))
    };
    let content =
        parts.as_mut().map(|(differences, sink, below)| Content { differences, sink: &mut *sink, below: &mut *below });
    let mut images = Rebase { overlay: &opener, content, parent };
    // Both tell the host.
    let reporter = core::cell::RefCell::new(reporter);
    let done = rebase(
        io,
        &mut images,
        config.dry_run,
        &mut |plan| {
            let PlanSummary { final_length, new_data_clusters, new_metadata_clusters, .. } = plan.sink;
            let (clusters, bytes) = (plan.clusters, plan.bytes);
            let message = Plan { clusters, bytes, final_length, new_data_clusters, new_metadata_clusters };
            reporter.borrow_mut().event(&message);
        },
        &mut |done| reporter.borrow_mut().progress(Step::Write.name(), done, total),
    );
    let plan = done.map_err(|RebaseFailure { step, error }| Failed { step: step.name(), error })?;
    Ok(Outcome { clusters_written: plan.clusters, bytes_written: plan.bytes })
}
