//! Running the guest of a commit: devices, modules, and what came of it.

use super::error::{map_commit_error, Changed, GuestFailure};
use super::handler::CommitHandler;
use super::progress::Progress;
use crate::chain::ChainImage;
use crate::cli::CliError;
use crate::devices::{Cache, Device, Devices, Statistics};
use crate::plugins::Plugin;
use crate::vm::{self, KvmDevice, ModuleSpec, VmError, VmReport, VmSpec, FIRST_FORMAT};
use instar_guest_abi::{
    device_flags, ChainConfig, DeviceConfig, ErrorCode, CHAIN_CONFIG_MAGIC, DEVICE_OUTPUT, MAX_CHAIN_DEVICES,
};
use instar_guest_protocol::CommitResultMessage;
use instar_plugin_api::CommitRole;
use std::path::PathBuf;

/// What the virtual machine did.
#[derive(Clone, Debug, Default)]
pub struct GuestRun {
    /// The runner's report.
    pub report: VmReport,
    /// What the devices moved.
    pub statistics: Statistics,
    /// Log lines of the guest.
    pub log: Vec<String>,
}

/// The modules that the chain needs, each once, and each image's index among them.
#[derive(Default)]
struct Modules<'r> {
    plugins: Vec<&'r Plugin>,
}

impl<'r> Modules<'r> {
    fn index(&mut self, plugin: &'r Plugin) -> u32 {
        let found = self.plugins.iter().position(|p| p.name() == plugin.name());
        let index = found.unwrap_or_else(|| {
            self.plugins.push(plugin);
            self.plugins.len() - 1
        });
        FIRST_FORMAT + u32::try_from(index).unwrap_or(u32::MAX - FIRST_FORMAT)
    }
}

/// Attach the images as devices, opened before: slot 0 is the overlay, the slots after it are the layers below it, and
/// `output` is the output device. Only the slots in `rw_slots` and the output may be written.
///
/// # Errors
/// [`ErrorCode::ChainTooDeep`].
pub fn open_chain_devices_rw<'r>(
    slots: Vec<ChainImage<'r>>,
    output: ChainImage<'r>,
    rw_slots: &[usize],
    max_length: u64,
) -> Result<(Devices, ChainConfig, Vec<&'r Plugin>), CliError> {
    let mut devices = Devices::new();
    let mut modules = Modules::default();
    let mut chain = ChainConfig { magic: CHAIN_CONFIG_MAGIC, merge_count: 1, ..ChainConfig::default() };
    if slots.len() > MAX_CHAIN_DEVICES {
        let clause = format!("the chain has more than {MAX_CHAIN_DEVICES} layers");
        return Err(CliError::image(&output.opened.path, ErrorCode::ChainTooDeep, clause));
    }
    chain.count = u32::try_from(slots.len()).unwrap_or(u32::MAX);
    for (index, image) in slots.into_iter().enumerate() {
        let slot = u32::try_from(index).unwrap_or(u32::MAX);
        // An overlay is only emptied: it may grow by the rest of its last cluster, if that was cut short.
        let unit = image.facts.cluster_size.max(1);
        let longest = image.facts.file_length.checked_next_multiple_of(unit).unwrap_or(image.facts.file_length);
        let writable = rw_slots.contains(&index);
        // A plugin that has to repair it first may need more.
        let asked = if writable {
            image.plugin.verdict(CommitRole::Overlay, &image.facts, &output.facts).max_length
        } else {
            0
        };
        chain.devices[index] = attach(&mut devices, &mut modules, slot, image, writable, longest.max(asked));
    }
    chain.output = attach(&mut devices, &mut modules, DEVICE_OUTPUT, output, true, max_length);
    Ok((devices, chain, modules.plugins))
}

fn attach<'r>(
    devices: &mut Devices,
    modules: &mut Modules<'r>,
    slot: u32,
    image: ChainImage<'r>,
    writable: bool,
    max_length: u64,
) -> DeviceConfig {
    let mut flags = device_flags::PRESENT;
    flags |= if writable { device_flags::WRITABLE } else { 0 };
    flags |= if image.opened.block_device { device_flags::FIXED_LENGTH } else { 0 };
    let block_device = image.opened.block_device;
    let (plugin, facts) = (image.plugin, image.facts);
    let device = Device::new(image.opened.file.into_file(), writable, facts.file_length, max_length, block_device);
    let config = DeviceConfig {
        flags,
        device: slot,
        module: modules.index(plugin),
        reserved: 0,
        file_length: facts.file_length,
        // What the host will hold the guest to, so that a driver that needs more says so before the first change.
        max_length: device.max_length(),
        virtual_size: facts.virtual_size,
        cluster_size: facts.cluster_size,
    };
    devices.attach(slot, device);
    config
}

/// How the guest of a commit is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct GuestOptions {
    /// Bits of [`commit_flags`](instar_guest_abi::commit_flags).
    pub flags: u32,
    /// The longest that the backing's file may become in bytes.
    pub max_length: u64,
    /// Bytes per second that are moved at most; 0 for no limit.
    pub rate_limit: u64,
    /// What flushes and writes promise.
    pub cache: Cache,
    /// Show progress on stderr.
    pub progress: bool,
}

/// Load the modules, stand up the virtual machine, run the commit of the overlay and the layers between it and the backing,
/// harvest its result. `kvm` was opened before the process was confined; without it, everything else is checked first.
///
/// # Errors
/// Why there is no guest, why it was ended, or what it refused: one line.
pub fn run_commit_guest(
    options: GuestOptions,
    kvm: Result<KvmDevice, VmError>,
    overlay: ChainImage<'_>,
    between: Vec<ChainImage<'_>>,
    backing: ChainImage<'_>,
    ancestors: Vec<ChainImage<'_>>,
) -> Result<(CommitResultMessage, GuestRun), CliError> {
    let backing_path = backing.opened.path.clone();
    let merged = 1 + between.len();
    let slots: Vec<ChainImage<'_>> = std::iter::once(overlay).chain(between).chain(ancestors).collect();
    let paths: Vec<PathBuf> = slots.iter().map(|image| image.opened.path.clone()).collect();
    let (mut devices, mut chain, plugins) = open_chain_devices_rw(slots, backing, &[0], options.max_length)?;
    chain.merge_count = u32::try_from(merged).unwrap_or(u32::MAX);

    let modules: Vec<ModuleSpec<'_>> = plugins
        .iter()
        .map(|plugin| ModuleSpec { name: plugin.name(), elf: plugin.guest_module().elf.as_slice() })
        .collect();
    devices.set_cache(options.cache).map_err(|(number, error)| {
        let path = usize::try_from(number).ok().and_then(|slot| paths.get(slot)).unwrap_or(&backing_path);
        let clause =
            format!("cannot be used with O_DIRECT ({error}): its file system may not support it, use -t writeback");
        CliError::image(path, ErrorCode::OpenFailed, clause)
    })?;
    let progress = options.progress.then(Progress::new);
    let pace = devices.pace_mut();
    pace.stop_when(super::interrupt::received);
    pace.limit(options.rate_limit);
    progress.iter().for_each(|progress| pace.watched_by(Box::new(progress.clone())));
    let mut handler = CommitHandler { progress, ..CommitHandler::new(devices) };
    let spec = VmSpec::new(options.flags, chain, modules);
    let ended = kvm.and_then(|kvm| vm::run_on(&kvm, &spec, &mut handler));
    let well = ended.is_ok() && handler.result.as_ref().is_some_and(|result| result.error == 0);
    handler.progress.iter().for_each(|progress| progress.end(well));
    let run = |report| GuestRun { report, statistics: handler.devices.stats().clone(), log: handler.log.clone() };
    let failure = match (ended, handler.result.take()) {
        (Ok(report), Some(result)) if result.error == 0 => return Ok((result, run(report))),
        (Ok(_), Some(result)) => GuestFailure::from_message(&result),
        (Ok(_), None) => GuestFailure::ended(ErrorCode::GuestProtocol, "the guest ended without a result"),
        (Err(error), _) => GuestFailure::ended(error.code(), error.to_string()),
    };
    let changed = Changed::of(&handler.devices);
    Err(map_commit_error(&failure, &paths, &backing_path, changed))
}
