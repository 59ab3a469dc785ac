//! Running the guest, and serving it.

use super::attach::Attached;
use super::error::CommitError;
use super::failure::{map_commit_error, map_vm_error, GuestFailure, Names, Step};
use super::interrupt::is_interrupted;
use super::state::Changed;
use super::trace::Trace;
use crate::devices::{BlockMover, CacheMode, IoStats};
use crate::vm::{BadRequest, BufferAccess, GuestHandler, KvmDevice, Vm, VmError, VmReport, VmSpec};
use instar_guest_abi::{ErrorCode, Request};
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::{CommitResultMessage, PlanMessage};
use std::time::Instant;

/// What a guest that succeeded reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestRun {
    /// Clusters of the overlay that were committed.
    pub clusters_committed: u64,
    /// Guest-visible bytes of them.
    pub bytes_committed: u64,
    /// Clusters that emptying the overlay dropped.
    pub overlay_clusters_cleared: u64,
}

/// Serves a commit.
struct CommitHandler<'a> {
    mover: BlockMover,
    formats: (&'a str, &'a str),
    result: Option<CommitResultMessage>,
    plan: Option<PlanMessage>,
    trace: &'a Trace,
}

fn bad<T>(text: impl Into<String>) -> Result<T, BadRequest> {
    Err(BadRequest(text.into()))
}

impl GuestHandler for CommitHandler<'_> {
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        if self.result.is_some() {
            return bad("requests after the result");
        }
        self.mover.execute(memory, requests)
    }

    fn message(&mut self, message: Kind) -> Result<(), BadRequest> {
        if self.result.is_some() {
            return bad("a message after the result");
        }
        match message {
            Kind::CommitResult(result) => {
                self.check_result(&result)?;
                self.result = Some(result);
            }
            Kind::Progress(progress) => {
                if Step::from_name(&progress.step).is_none() || progress.done > progress.total {
                    return bad("progress that makes no sense");
                }
            }
            Kind::Log(log) => self.trace.line(format_args!("guest: {}", log.text)),
            Kind::Plan(plan) => {
                if self.plan.is_some() {
                    return bad("a second plan");
                }
                self.trace.line(format_args!(
                    "plan: {} clusters, {} bytes; {} new data clusters, {} new metadata clusters; the backing becomes at \
                     most {} bytes long",
                    plan.clusters,
                    plan.bytes,
                    plan.new_data_clusters,
                    plan.new_metadata_clusters,
                    plan.backing_final_length
                ));
                self.plan = Some(plan);
            }
            // The runner ends the guest for this one.
            Kind::Panic(panic) => return bad(format!("a panic: {}", panic.text)),
        }
        Ok(())
    }

    fn interrupted(&self) -> bool {
        // Once the result is there, nothing is left to interrupt.
        self.result.is_none() && is_interrupted()
    }
}

impl CommitHandler<'_> {
    fn check_result(&self, result: &CommitResultMessage) -> Result<(), BadRequest> {
        let Some(code) = ErrorCode::from_u32(result.error) else {
            return bad(format!("a result with the unknown error {}", result.error));
        };
        if code != ErrorCode::Ok && Step::from_name(&result.step).is_none() {
            return bad(format!("a failure at the unknown step {:?}", result.step));
        }
        // A guest may leave them empty.
        let named = [(&result.overlay_format, self.formats.0), (&result.backing_format, self.formats.1)];
        if named.iter().any(|(said, known)| !said.is_empty() && said != known) {
            return bad("a result about other formats");
        }
        Ok(())
    }

    fn changed(&self) -> Changed {
        Changed::of(self.mover.devices())
    }
}

/// Run the guest on the attached images.
///
/// # Errors
/// Why there is no guest, why it was ended, or what it reported.
pub fn run_commit_guest(
    attached: Attached<'_>,
    flags: u32,
    cache: CacheMode,
    trace: &mut Trace,
) -> Result<GuestRun, CommitError> {
    let Attached { devices, chain, modules, names, formats } = attached;
    let spec = VmSpec::new(flags, chain, modules);
    let vm = KvmDevice::open()
        .and_then(|kvm| Vm::new(&kvm, &spec))
        .map_err(|error| map_vm_error(&error, &names, Changed::default()))?;
    trace.lap("create virtual machine, load modules");
    let mover = BlockMover::new(devices, cache, is_interrupted);
    let shown = Trace::clone(trace);
    let mut handler = CommitHandler { mover, formats, result: None, plan: None, trace: &shown };
    let started = Instant::now();
    let outcome = vm.run(&mut handler);
    let elapsed = started.elapsed();
    if let Ok(report) = &outcome {
        tell(trace, report, handler.mover.stats());
        trace.time("  tear-down", elapsed.saturating_sub(report.time_run));
    } else {
        tell_stats(trace, handler.mover.stats());
    }
    trace.lap("run");
    harvest(outcome, &handler, &names)
}

fn harvest(
    outcome: Result<VmReport, VmError>,
    handler: &CommitHandler<'_>,
    names: &Names,
) -> Result<GuestRun, CommitError> {
    let changed = handler.changed();
    if let Err(error) = outcome {
        return Err(map_vm_error(&error, names, changed));
    }
    let Some(result) = &handler.result else {
        let error = VmError::GuestProtocol("it ended without a result".to_owned());
        return Err(map_vm_error(&error, names, changed));
    };
    match (ErrorCode::from_u32(result.error), Step::from_name(&result.step)) {
        (Some(ErrorCode::Ok), _) => Ok(GuestRun {
            clusters_committed: result.clusters_committed,
            bytes_committed: result.bytes_committed,
            overlay_clusters_cleared: result.overlay_clusters_cleared,
        }),
        (code, step) => {
            let failure = GuestFailure {
                code: code.unwrap_or(ErrorCode::GuestProtocol),
                device: Some(result.error_device).filter(|&device| device != u32::MAX),
                offset: Some(result.error_offset).filter(|&offset| offset != u64::MAX),
                errno: result.error_errno,
                text: result.error_text.clone(),
                step: step.unwrap_or(Step::Check),
            };
            Err(map_commit_error(&failure, names, changed))
        }
    }
}

fn tell(trace: &Trace, report: &VmReport, stats: IoStats) {
    trace.line(format_args!(
        "guest: ring {}, {} exits, {} doorbells, {} requests, {} messages",
        report.ring, report.exits, report.doorbells, report.requests, report.messages
    ));
    tell_stats(trace, stats);
    trace.time("  create machine", report.time_create);
    trace.time("  load modules", report.time_load);
    trace.time("  first exit", report.time_first_exit);
    trace.time("  guest run", report.time_run);
    trace.time("  of that in the guest", report.time_guest);
}

fn tell_stats(trace: &Trace, stats: IoStats) {
    trace.line(format_args!(
        "bytes: {} read and {} written through the guest, {} copied by the kernel, {} copied by the host, {} zeroed or \
         given back; {} calls; {} flushes, {} skipped",
        stats.guest_read,
        stats.guest_written,
        stats.kernel_copied,
        stats.host_copied,
        stats.zeroed,
        stats.calls,
        stats.flushes,
        stats.flushes_skipped
    ));
}
