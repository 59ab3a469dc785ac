//! The operation as the guest runs it: open the images of the chain, commit, report.

use crate::bitmaps::told;
use crate::open::open;
use crate::read_back::LookBack;
use crate::relinks;
use crate::target::Target;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::RefCell;
use instar_guest_protocol::commit::event::Kind;
use instar_guest_protocol::commit::{self, Complete, Config, Outcome, Plan};
use instar_guest_protocol::Message;
use instar_guest_sdk::abi::{DeviceConfig, ErrorCode, MemberRole, DEVICE_OUTPUT};
use instar_guest_sdk::commit::{commit_and_read_back, Commit, CommitFailure, Event, Options, ReadBack, Step};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{log, BlockIo, DriverError, DriverResult, Relinks, Sink, Source};
use instar_guest_view::{Ancestors, Detected, Failed, Filtered, Layers, Opener, Reporter};

/// The step in which the overlay's children name the target.
const RELINK: &str = "relink";

/// Run the commit that the host asked for, and report it.
pub fn run(operation: &Operation<'_>, io: &mut dyn BlockIo, send: &mut dyn FnMut(&[u8])) {
    let reporter = RefCell::new(Reporter::new(send));
    let committed = run_chain(operation, io, &reporter);
    let outcome = committed.map(|outcome| Outcome {
        clusters_committed: outcome.clusters_committed,
        bytes_committed: outcome.bytes_committed,
        overlay_clusters_cleared: outcome.overlay_clusters_cleared,
    });
    reporter.into_inner().end(outcome);
}

/// The members of a commit, checked.
struct Members<'a> {
    /// The layers that are committed, the overlay first.
    merged: Vec<&'a DeviceConfig>,
    /// The overlay is emptied at the end.
    emptied: bool,
    /// The image that they are committed into.
    output: &'a DeviceConfig,
    /// What is below that image, nearest first.
    below: Vec<&'a DeviceConfig>,
}

impl<'a> Members<'a> {
    fn of(operation: &Operation<'a>) -> DriverResult<Self> {
        let wrong = |text: &str| DriverError::new(ErrorCode::GuestProtocol, text);
        let emptied = operation.devices(&[MemberRole::Empty]).count();
        let mut written = operation.devices(&[MemberRole::Write]);
        let output = written.next().filter(|output| output.device == DEVICE_OUTPUT && written.next().is_none());
        let members = Self {
            merged: operation.devices(&[MemberRole::Read, MemberRole::Empty]).collect(),
            emptied: emptied != 0,
            output: output.ok_or_else(|| wrong("a commit writes one image, on the output device"))?,
            below: operation.devices(&[MemberRole::Below]).collect(),
        };
        match members.merged.len() {
            0 => Err(wrong("a commit needs an overlay")),
            merged if emptied > 1 || (emptied == 1 && merged > 1) => Err(wrong("only an overlay alone is emptied")),
            _ => Ok(members),
        }
    }
}

/// What the operator wants.
fn config(operation: &Operation<'_>) -> DriverResult<Config> {
    Config::decode(operation.payload())
        .map_err(|_| DriverError::new(ErrorCode::GuestProtocol, "the configuration of a commit cannot be decoded"))
}

fn run_chain(
    operation: &Operation<'_>,
    io: &mut dyn BlockIo,
    reporter: &RefCell<Reporter<'_>>,
) -> Result<crate::Outcome, Failed> {
    let at = |error| Failed { step: Step::Check.name(), error };
    let members = Members::of(operation).map_err(at)?;
    let Config { dry_run, resize_backing, relinked, bitmaps, announce_complete, verify, digest, detect_zeroes } =
        config(operation).map_err(at)?;
    let options = Options { keep_overlay: !members.emptied, dry_run, resize_backing, bitmaps, ..Options::default() };
    let wanted = relinked.unwrap_or_default();
    let children = relinks::children(operation, &wanted).map_err(at)?;
    let identity = relinks::identity(&wanted).map_err(at)?;
    let open = |device: &DeviceConfig| open(operation, device);
    let mut sources: Vec<Box<dyn Source>> =
        members.merged.iter().map(|device| open(device)).collect::<DriverResult<_>>().map_err(at)?;
    let has_backing = !members.below.is_empty();
    let sink = operation.format_of(members.output).and_then(|format| format.open_sink(members.output, has_backing));
    let mut sink = sink.map_err(at)?;
    // Each can be opened: that is asked now, before the first change. It stays open only once it is needed.
    members.below.iter().try_for_each(|device| open(device).map(drop)).map_err(at)?;
    let layers = members
        .below
        .iter()
        .map(|&device| -> (u64, Opener<'_>) { (device.virtual_size, Box::new(move || open(device))) });
    let mut below = Ancestors::when_needed(layers);
    // One layer is its own view; several are one through which the top-most is seen first.
    let mut source: Box<dyn Source + '_> = match sources.pop() {
        Some(only) if sources.is_empty() => only,
        last => Box::new(Layers::new(sources.into_iter().chain(last).collect())),
    };
    if detect_zeroes {
        source = Box::new(Filtered::by(Detected::new(Detected::unit_for(&sink.info())), source));
    }
    let mut images = Commit { source: source.as_mut(), sink: &mut sink, below: &mut below };
    let mut relinks = Relinks::new(&children, &wanted.format, identity);
    let mut watch = |event: Event<'_>| match event {
        Event::Complete if !announce_complete => {}
        event => report(event, &mut reporter.borrow_mut()),
    };
    let target = Target { operation, output: members.output, below: &members.below, reporter };
    let mut back = LookBack { target, merged: members.merged.clone(), verify, digest };
    let read_back = (verify || digest).then_some(&mut back as &mut dyn ReadBack);
    let committed = commit_and_read_back(io, &mut images, &mut relinks, read_back, options, &mut watch);
    let outcome = committed.map_err(|CommitFailure { step, error }| Failed { step: step.name(), error })?;
    if !dry_run {
        let total = children.len() as u64;
        let relinked = relinks.set(io, &mut |done| reporter.borrow_mut().progress(RELINK, done, total));
        relinked.map_err(|error| Failed { step: RELINK, error })?;
    }
    Ok(outcome)
}

fn report(event: Event<'_>, reporter: &mut Reporter<'_>) {
    let plan = match event {
        Event::Progress(step, done, total) => return reporter.progress(step.name(), done, total),
        Event::Bitmap(merged) => return reporter.event(&message(Kind::Bitmap(told(merged)))),
        Event::Complete => return reporter.event(&message(Kind::Complete(Complete {}))),
        Event::Planned(plan) => plan,
    };
    let tables = plan.sink.unread_tables;
    if tables > 0 {
        log!(
            "the backing's {tables} mapping tables were not compared with what is changed: that would cost more than the \
             commit; `instar check` does it"
        );
    }
    reporter.event(&message(Kind::Plan(Plan {
        clusters: plan.clusters,
        bytes: plan.bytes,
        backing_final_length: plan.sink.final_length,
        new_data_clusters: plan.sink.new_data_clusters,
        new_metadata_clusters: plan.sink.new_metadata_clusters,
        encoded_bytes: plan.encoded_bytes,
    })));
}

fn message(kind: Kind) -> commit::Event {
    commit::Event { kind: Some(kind) }
}
