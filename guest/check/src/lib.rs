//! The check operation: it lets the format of one image look at all of its metadata, and reports. If the operator wants it, it
//! lets the format repair the image as well, and looks again.
//!
//! The crate is an ordinary `no_std` library; the module that runs in the guest is a thin shell around it
//! (`src/bin`).
#![no_std]

extern crate alloc;

use alloc::string::String;
use instar_guest_protocol::check::{event, Config, Event, Finding, Outcome, Plan};
use instar_guest_protocol::Message;
use instar_guest_sdk::abi::{
    CheckSummary, DeviceConfig, ErrorCode, FindingKind, MemberRole, Phase, Repair, RepairSummary,
};
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Source};
use instar_guest_view::{Failed, Reporter};

/// Findings that are sent as text, of each examination and of the plan of a repair. All are counted.
pub const MAX_FINDINGS: u64 = 200;

/// The steps of a repair, as failures name them.
const PLAN: &str = "plan";
const REPAIR: &str = "repair";
const CHECK_AGAIN: &str = "check again";

/// Check the image of this operation, repair it if that is wanted, and report what was found.
pub fn run(operation: &Operation<'_>, io: &mut dyn BlockIo, send: &mut dyn FnMut(&[u8])) {
    let mut reporter = Reporter::new(send);
    let checked = check(operation, io, &mut reporter);
    reporter.end(checked.map(outcome));
}

fn check(operation: &Operation<'_>, io: &mut dyn BlockIo, reporter: &mut Reporter<'_>) -> Result<CheckSummary, Failed> {
    let config = Config::decode(operation.payload())
        .map_err(|_| DriverError::new(ErrorCode::GuestProtocol, "the configuration of a check cannot be decoded"))?;
    let mut devices = operation.devices(&[MemberRole::Read, MemberRole::Write]);
    let device = devices.next().filter(|_| devices.next().is_none());
    let device = device.ok_or_else(|| DriverError::new(ErrorCode::GuestProtocol, "a check is of one image"))?;
    let format = operation.format_of(device)?;
    let found = examine(&mut format.open_source(device)?, io, reporter)?;
    let Some(what) = Repair::from_u32(config.repair) else { return Ok(found) };
    let in_step = |step| move |error| Failed { step, error };
    // A source plans when it was just opened.
    let mut source = format.open_source(device)?;
    let planned = plan(&mut source, io, what, reporter).map_err(in_step(PLAN))?;
    let RepairSummary { corruptions, leaks, final_length } = planned;
    let plan = Plan { corruptions, leaks, final_length, found: Some(outcome(found)) };
    reporter.event(&Event { kind: Some(event::Kind::Plan(plan)) });
    if config.dry_run || (corruptions, leaks) == (0, 0) {
        return Ok(found);
    }
    io.enter(Phase::Target);
    source.repair(io).map_err(in_step(REPAIR))?;
    drop(source);
    // Nobody says how long the file is now. What is behind its end reads as zeroes, as what is new does.
    let longer = DeviceConfig { file_length: device.file_length.max(final_length), ..*device };
    let again = format.open_source(&longer).and_then(|mut source| examine(&mut source, io, reporter));
    again.map_err(in_step(CHECK_AGAIN))
}

fn outcome(found: CheckSummary) -> Outcome {
    Outcome {
        image_end_offset: found.image_end_offset,
        total_clusters: found.total_clusters,
        allocated_clusters: found.allocated_clusters,
        fragmented_clusters: found.fragmented_clusters,
        compressed_clusters: found.compressed_clusters,
        corruptions: found.corruptions,
        leaks: found.leaks,
        unused_tail: found.unused_tail,
    }
}

/// What sends the first findings.
fn sender<'a, 'r>(reporter: &'a mut Reporter<'r>, kept: bool) -> impl FnMut(FindingKind, &str) + use<'a, 'r> {
    let mut sent = 0;
    move |kind, text| {
        if sent < MAX_FINDINGS {
            sent += 1;
            let finding = Finding { kind: kind as u32, text: String::from(text), kept };
            reporter.event(&Event { kind: Some(event::Kind::Finding(finding)) });
        }
    }
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
    source.check(io, &mut sender(reporter, false))
}

/// Plan a repair; the first reasons why something is not repaired are sent.
fn plan(
    source: &mut dyn Source,
    io: &mut dyn BlockIo,
    what: Repair,
    reporter: &mut Reporter<'_>,
) -> DriverResult<RepairSummary> {
    source.plan_repair(io, what, &mut sender(reporter, true))
}
