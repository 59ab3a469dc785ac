//! Running the guest of a commit: devices, modules, and what came of it.

use super::attach::{open_chain_devices_rw, ChainDevices, Slot};
use super::error::{map_commit_error, Changed, GuestFailure};
use super::handler::CommitHandler;
use super::notes::{Announcement, Notes};
use super::plan::PlanBounds;
use super::progress::{Ending, Progress};
use super::repeated::Repeated;
use super::space::{free_space, taken_space, Space};
use crate::devices::{Cache, Device, Statistics, Workers};
use crate::error::Error;
use crate::image::ChainImage;
use crate::plugins::ImageRead;
use crate::vm::{self, KvmDevice, VmError, VmReport, VmSpec};
use instar_guest_abi::{ErrorCode, MemberRole, Phase, DEVICE_OUTPUT};
use instar_guest_protocol::{CommitConfig, CommitResultMessage, Message, PlanMessage};
use std::path::Path;

/// What the virtual machine did.
#[derive(Clone, Debug, Default)]
pub struct GuestRun {
    /// The runner's report.
    pub report: VmReport,
    /// What the devices moved.
    pub statistics: Statistics,
    /// Log lines of the guest.
    pub log: Vec<String>,
    /// By how many bytes the backing's files grow at most, and how many its file system has for them.
    pub growth: Growth,
}

/// What a commit means for the space of the backing's file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Growth {
    /// Bytes by which the backing's file gets longer, at most.
    pub bytes: u64,
    /// Bytes that it takes of the disk besides what it has, at most: more than it grows by, where it has holes.
    pub space: u64,
    /// Bytes that are free for this user; `None` for a block device, and where the file system does not say.
    pub free: Option<u64>,
}

impl Growth {
    /// What a plan means for a backing whose files are `length` bytes long, take `taken` bytes of the disk (`None` for a
    /// block device), and have clusters of so many bytes. What is committed as zeroes counts like data: only the write says
    /// how much of it can stay a hole.
    fn of(plan: &PlanMessage, length: u64, taken: Option<u64>, cluster: u64) -> Self {
        let bytes = plan.backing_final_length.saturating_sub(length);
        let metadata = plan.new_metadata_clusters.saturating_mul(cluster);
        let written = plan.bytes.max(plan.new_data_clusters.saturating_mul(cluster)).saturating_add(metadata);
        let holes = |taken: u64| plan.backing_final_length.max(length).saturating_sub(taken);
        Self { bytes, space: taken.map_or(0, |taken| holes(taken).min(written)), free: None }
    }
}

/// How the guest of a commit is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct GuestOptions {
    /// What the guest is told.
    pub config: CommitConfig,
    /// Leave the overlay as it is.
    pub keep_overlay: bool,
    /// The longest that the backing's file may become in bytes.
    pub max_length: u64,
    /// Bytes per second that are moved at most; 0 for no limit.
    pub rate_limit: u64,
    /// What flushes and writes promise.
    pub cache: Cache,
    /// Show progress on stderr.
    pub progress: bool,
}

/// What a commit needs of the system, and a [confined](crate::confine) process can get no more.
pub struct Acquired {
    /// The KVM device. Without it, everything else is checked first.
    pub kvm: Result<KvmDevice, VmError>,
    /// Threads that copy side by side, if there is much to copy and the system has them.
    pub workers: Option<Workers>,
}

/// The images of a commit, each open.
pub struct CommitChain<'r> {
    /// The overlay.
    pub overlay: ChainImage<'r>,
    /// The layers between it and the backing, the top-most first.
    pub between: Vec<ChainImage<'r>>,
    /// What is committed into.
    pub backing: ChainImage<'r>,
    /// What is below that, nearest first.
    pub ancestors: Vec<ChainImage<'r>>,
}

/// Load the modules, stand up the virtual machine, run the commit of the overlay and the layers between it and the backing,
/// harvest its result. The announcement is made between the plan and the first change; `notes` takes what the guest of a
/// commit that failed logged.
///
/// # Errors
/// Why there is no guest, why it was ended, or what it refused: one line.
pub fn run_commit_guest(
    options: GuestOptions,
    acquired: Acquired,
    chain: CommitChain<'_>,
    announcement: Announcement,
    notes: &mut Notes,
) -> Result<(CommitResultMessage, GuestRun), Error> {
    let CommitChain { overlay, between, mut backing, ancestors } = chain;
    let layers: Vec<&ChainImage<'_>> = std::iter::once(&overlay).chain(&between).collect();
    let space = Space::of(&backing, &layers);
    let overlay_files = overlay.files.iter().map(|file| file.opened.file.length());
    let overlay_length = overlay_files.fold(overlay.opened.file.length(), u64::saturating_add);
    let (length, taken, free) = (backing.facts.file_length, taken_space(&backing), free_space(&backing));
    let bounds = PlanBounds::of(&overlay, &backing);
    let last_phase = match (options.config.dry_run, options.keep_overlay) {
        (true, _) => Phase::Look,
        (false, true) => Phase::Target,
        (false, false) => Phase::Overlay,
    };
    let merged = 1 + between.len();
    let top = if options.keep_overlay { MemberRole::Read } else { MemberRole::Empty };
    let between = between.into_iter().map(|layer| (MemberRole::Read, layer));
    let ancestors = ancestors.into_iter().map(|layer| (MemberRole::Below, layer));
    let doubt = backing.doubt.take();
    let slots: Vec<Slot<'_>> = std::iter::once((top, overlay)).chain(between).chain(ancestors).collect();
    let all = open_chain_devices_rw(slots, backing, options.max_length)?;
    let modules = all.modules();
    let ChainDevices { mut devices, members, files, mut paths, .. } = all;
    paths.merged = u32::try_from(merged).unwrap_or(u32::MAX);
    devices.set_workers(acquired.workers);
    devices.set_cache(options.cache).map_err(|(number, error)| {
        let path = paths.get(number).unwrap_or(Path::new(""));
        let clause =
            format!("cannot be used with O_DIRECT ({error}): its file system may not support it, use -t writeback");
        Error::image(path, ErrorCode::OpenFailed, clause)
    })?;
    let durable = options.cache != Cache::Unsafe;
    let progress = options.progress.then(|| Progress::new(overlay_length, &devices, paths.backing(), durable));
    let pace = devices.pace_mut();
    pace.stop_when(super::interrupt::received);
    pace.limit(options.rate_limit);
    progress.iter().for_each(|progress| pace.watched_by(Box::new(progress.clone())));
    let repeated = doubt.as_ref().and_then(|doubt| Repeated::new(&doubt.mark));
    let announcement = Some(announcement);
    let longest = paths.backing().filter_map(|number| devices.device(number)).map(Device::max_length);
    let bounds = PlanBounds { longest: longest.fold(0, u64::saturating_add), ..bounds };
    let handler = CommitHandler { progress, space, repeated, announcement, ..CommitHandler::new(devices) };
    let mut handler = CommitHandler { last_phase, bounds, ..handler };
    let spec = VmSpec { files, ..VmSpec::new(options.config.encode_to_vec(), members, modules) };
    let ended = acquired.kvm.and_then(|kvm| vm::run_on(&kvm, &spec, &mut handler));
    let well = ended.is_ok() && handler.result.as_ref().is_some_and(|result| result.error == 0);
    let ending = match well {
        true if options.config.dry_run => Ending::DryRun,
        true => Ending::Done,
        false => Ending::Failed,
    };
    handler.progress.iter().for_each(|progress| progress.end(ending));
    let growth =
        handler.plan.map_or(Growth::default(), |plan| Growth::of(&plan, length, taken, bounds.backing_cluster));
    let run = |report| GuestRun {
        report,
        statistics: handler.devices.stats().clone(),
        log: handler.log.lines().to_vec(),
        growth: Growth { free, ..growth },
    };
    let failure = match (ended, handler.result.take()) {
        _ if handler.lacking.is_some() => no_space(handler.lacking),
        _ if handler.repeated.as_ref().is_some_and(Repeated::is_refused) => {
            let clause = doubt.map(|doubt| doubt.clause).unwrap_or_default();
            GuestFailure { device: Some(DEVICE_OUTPUT), ..GuestFailure::ended(ErrorCode::FormatMismatch, clause) }
        }
        (Ok(report), Some(result)) if result.error == 0 => return Ok((result, run(report))),
        (Ok(_), Some(result)) => GuestFailure::from_message(&result),
        (Ok(_), None) => GuestFailure::ended(ErrorCode::GuestProtocol, "the guest ended without a result"),
        (Err(error), _) => GuestFailure::of_machine(&error),
    };
    for line in handler.log.lines() {
        notes.push(|| format!("guest says: {line}"));
    }
    let changed = Changed::of(&handler.devices);
    Err(map_commit_error(&failure, &paths, changed))
}

/// The file system of the backing has less space than the commit needs.
fn no_space(lacking: Option<(u64, u64)>) -> GuestFailure {
    let (needed, free) = lacking.unwrap_or_default();
    let text = format!("the commit needs {needed} bytes more of the file system, which has {free} free");
    GuestFailure { device: Some(DEVICE_OUTPUT), ..GuestFailure::ended(ErrorCode::NoSpace, text) }
}
