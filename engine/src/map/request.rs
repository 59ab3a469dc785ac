//! From a file name to a map.

use super::handler::MapHandler;
use super::{places, Reporter};
use crate::commit::{map_read_error, open_chain_devices_ro, ChainDevices, GuestFailure};
use crate::confine::{Confinement, Work};
use crate::error::Error;
use crate::image::{
    allow_many_open_files, check_parents, open_extra_files, prepare_to_lock, Access, Descent, FilesOf, Gate, NamedFile,
    Roots,
};
use crate::plugins::{ImageRead, Registry, SearchPath};
use crate::vm::{self, KvmDevice, VmSpec};
use instar_guest_abi::{ErrorCode, MAX_CHAIN_DEVICES};
use std::path::PathBuf;

/// What the operator asks for.
#[derive(Clone, Debug, Default)]
pub struct MapRequest {
    /// The image.
    pub image: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// Look at the images even if something else is writing to them.
    pub force_share: bool,
    /// Seconds to wait for images that are in use.
    pub wait: u64,
    /// Directories that recorded names may lead into.
    pub allowed_directories: Vec<PathBuf>,
    /// Where plugins are looked for.
    pub search: SearchPath,
}

/// Bytes of messages that a run can take, at most.
const RUN_BYTES: u64 = 64;
/// Runs that one entry of a table can stand for: the subclusters of a qcow2 cluster, and what is between two such.
const RUNS_PER_ENTRY: u64 = 33;
/// An entry takes four bytes of a file at least.
const ENTRY_BYTES: u64 = 4;

/// Map an image and what is below it; `log` takes the lines of the guest, which are not safe for a terminal. The calling process is [confined](crate::confine) by it, for good.
///
/// # Errors
/// One line that names the file and what to do. What was reported until then stays reported.
pub fn run_map(request: &MapRequest, reporter: &mut Reporter<'_>, log: &mut Vec<String>) -> Result<(), Error> {
    allow_many_open_files();
    let file = NamedFile::new(&request.image);
    let roots = Roots::of(&file, &request.allowed_directories)?;
    let registry = Registry::load(&request.search);
    Error::if_refused(&registry)?;
    let kvm = KvmDevice::open();
    prepare_to_lock(request.wait, [&file], &request.allowed_directories);
    let access = if request.force_share { Access::Shared } else { Access::ReadOnly };
    let opened = file.open(access, ErrorCode::ImageNotFound)?.lock(access)?;
    let confinement = Confinement::begin(&roots.reach(access), Work::OpenToRead);

    let gate = Gate::within(roots);
    let top = opened.identify_as(&registry, request.format.as_deref())?;
    let below = Descent::new(&registry, &gate, file.path(), MAX_CHAIN_DEVICES - 1).open_below(&top, access)?;
    let mut layers: Vec<_> = std::iter::once(top).chain(below).collect();
    check_parents(&layers.iter().collect::<Vec<_>>())?;
    let mut files: Vec<FilesOf<'_, '_, '_>> =
        layers.iter_mut().map(|image| FilesOf { image, access, changes: false, gate: &gate }).collect();
    open_extra_files(&registry, &mut files)?;
    // For good: what is returned is only what was in force.
    let _ = confinement.seal(Work::Read);

    let size = layers.first().map_or(0, |top| top.facts.virtual_size);
    let places = places(&layers);
    // No image has more runs than entries; each layer may cut those of the others.
    let length = layers.iter().flat_map(|layer| {
        let files = layer.files.iter().map(|file| file.opened.file.length());
        files.chain([layer.opened.file.length()])
    });
    let runs = (length.fold(0, u64::saturating_add) / ENTRY_BYTES).saturating_mul(2 * RUNS_PER_ENTRY);
    let limit = runs.saturating_mul(RUN_BYTES).saturating_add(16 << 20);
    let all = open_chain_devices_ro(layers)?;
    let modules = all.modules();
    let ChainDevices { devices, members, files, paths, .. } = all;
    let spec =
        VmSpec { files, ..VmSpec::new(Vec::new(), members, modules) }.with_operation(vm::MAP).with_message_limit(limit);
    let mut handler = MapHandler::new(devices, places, size, reporter);
    let ended = kvm.and_then(|kvm| vm::run_on(&kvm, &spec, &mut handler));
    log.extend_from_slice(handler.log.lines());
    if let Some(error) = handler.unreported.take() {
        return Err(error);
    }
    let failure = match (ended, handler.result.take()) {
        (Ok(_), Some(Ok(()))) => return handler.end(),
        (Ok(_), Some(Err(failure))) => failure,
        (Ok(_), None) => GuestFailure::ended(ErrorCode::GuestProtocol, "the guest ended without a result"),
        (Err(error), _) => GuestFailure::of_machine(&error),
    };
    Err(map_read_error(&failure, &paths))
}
