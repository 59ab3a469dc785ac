//! The operation as the guest runs it: open the images of the chain, commit, report.

use crate::below::Ancestors;
use crate::commit::{commit, Commit, CommitFailure, Event, Options, Outcome, Step};
use crate::layers::Layers;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::{CommitResultMessage, GuestMessage, Message, PlanMessage, ProgressMessage};
use instar_guest_sdk::abi::{commit_flags, ChainConfig, DeviceConfig, ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Source};

/// Run the commit that the host asked for, and send its result.
pub fn run(operation: &Operation<'_>, io: &mut dyn BlockIo, send: &mut dyn FnMut(&[u8])) {
    let result = match run_chain(operation, io, send) {
        Ok(outcome) => CommitResultMessage {
            clusters_committed: outcome.clusters_committed,
            bytes_committed: outcome.bytes_committed,
            overlay_clusters_cleared: outcome.overlay_clusters_cleared,
            error_device: u32::MAX,
            error_offset: u64::MAX,
            ..CommitResultMessage::default()
        },
        Err(failure) => failure_message(&failure),
    };
    send_kind(send, Kind::CommitResult(result));
}

fn send_kind(send: &mut dyn FnMut(&[u8]), kind: Kind) {
    send(&GuestMessage { kind: Some(kind) }.encode_to_vec());
}

fn failure_message(failure: &CommitFailure) -> CommitResultMessage {
    let error = &failure.error;
    CommitResultMessage {
        error: error.code.number(),
        error_device: error.device.unwrap_or(u32::MAX),
        error_offset: error.offset.unwrap_or(u64::MAX),
        error_errno: error.errno,
        error_text: error.text.clone(),
        step: String::from(failure.step.name()),
        ..CommitResultMessage::default()
    }
}

/// The devices of a chain, checked: the layers that are committed, the overlay first, and what is below the output.
fn devices(chain: &ChainConfig) -> DriverResult<(&[DeviceConfig], &[DeviceConfig])> {
    let wrong = |text: &str| DriverError::new(ErrorCode::GuestProtocol, text);
    let count = usize::try_from(chain.count).unwrap_or(usize::MAX);
    let layers = chain.devices.get(..count).ok_or_else(|| wrong("the chain has too many devices"))?;
    let merged = usize::try_from(chain.merge_count).unwrap_or(usize::MAX);
    let split = layers.split_at_checked(merged).filter(|(merged, _)| !merged.is_empty());
    let split = split.ok_or_else(|| wrong("the chain has no overlay, or more layers than devices"))?;
    if chain.output.device != DEVICE_OUTPUT {
        return Err(wrong("the output is not the output device"));
    }
    Ok(split)
}

/// The images on these devices, as sources.
fn open_sources<'a>(operation: &Operation<'a>, devices: &'a [DeviceConfig]) -> DriverResult<Vec<Box<dyn Source + 'a>>> {
    let open = |device: &'a DeviceConfig| -> DriverResult<Box<dyn Source + 'a>> {
        Ok(Box::new(operation.format_of(device)?.open_source(device)?))
    };
    devices.iter().map(open).collect()
}

fn run_chain(
    operation: &Operation<'_>,
    io: &mut dyn BlockIo,
    send: &mut dyn FnMut(&[u8]),
) -> Result<Outcome, CommitFailure> {
    let at = |error| CommitFailure { step: Step::Check, error };
    let (merged, ancestors) = devices(operation.chain).map_err(at)?;
    let mut sources = open_sources(operation, merged).map_err(at)?;
    let output = &operation.chain.output;
    let mut sink = operation.format_of(output).and_then(|f| f.open_sink(output, !ancestors.is_empty())).map_err(at)?;
    let layers = open_sources(operation, ancestors).map_err(at)?;
    let mut below = Ancestors::new(layers);
    let flags = operation.config.flags;
    let options = Options {
        keep_overlay: flags & commit_flags::KEEP_OVERLAY != 0,
        dry_run: flags & commit_flags::DRY_RUN != 0,
        resize_backing: flags & commit_flags::RESIZE_BACKING != 0,
    };
    // One layer is its own view; several are one through which the top-most is seen first.
    let mut source: Box<dyn Source + '_> = match sources.pop() {
        Some(only) if sources.is_empty() => only,
        last => Box::new(Layers::new(sources.into_iter().chain(last).collect())),
    };
    let mut images = Commit { source: source.as_mut(), sink: &mut sink, below: &mut below };
    commit(io, &mut images, options, &mut |event| send_kind(send, event_message(event)))
}

fn event_message(event: Event) -> Kind {
    match event {
        Event::Progress(step, done, total) => {
            Kind::Progress(ProgressMessage { step: String::from(step.name()), done, total })
        }
        Event::Planned(clusters, bytes, plan) => Kind::Plan(PlanMessage {
            clusters,
            bytes,
            backing_final_length: plan.final_length,
            new_data_clusters: plan.new_data_clusters,
            new_metadata_clusters: plan.new_metadata_clusters,
        }),
    }
}
