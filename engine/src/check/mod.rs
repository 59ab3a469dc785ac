//! `instar check`: is the metadata of an image consistent? The format's own module looks at it in the virtual machine;
//! nothing is changed.

pub(crate) mod handler;

use crate::commit::{map_read_error, open_chain_devices_ro, ChainDevices, GuestFailure};
use crate::confine::{Confinement, Work};
use crate::error::Error;
use crate::image::{
    check_immediate_parent, open_extra_files, prepare_to_lock, Access, FilesOf, Gate, NamedFile, Roots,
};
use crate::plugins::{Registry, SearchPath};
use crate::vm::{self, KvmDevice, VmSpec};
use handler::CheckHandler;
use instar_guest_abi::{ErrorCode, Examination, FindingKind};
use std::path::PathBuf;

/// What the operator asks for.
#[derive(Clone, Debug, Default)]
pub struct CheckRequest {
    /// The image.
    pub image: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// Look at it even if something else is writing to it.
    pub force_share: bool,
    /// Seconds to wait for images that are in use.
    pub wait: u64,
    /// Directories that the names of other files of the image may lead into.
    pub allowed_directories: Vec<PathBuf>,
    /// Where plugins are looked for.
    pub search: SearchPath,
}

/// What a check found.
#[derive(Clone, Debug)]
pub struct CheckResult {
    /// The image's format.
    pub format: String,
    /// The findings, in numbers.
    pub found: Examination,
    /// The first findings, one line each as the guest wrote it: not safe for a terminal.
    pub findings: Vec<(FindingKind, String)>,
}

/// Check an image; `log` takes the lines of the guest, which are not safe for a terminal. The calling process is [confined](crate::confine) by it, for good.
///
/// # Errors
/// One line that names the file and what to do: when the image could not be checked to the end.
/// [`ErrorCode::NotImplemented`] for a format that has nothing to check.
pub fn run_check(request: &CheckRequest, log: &mut Vec<String>) -> Result<CheckResult, Error> {
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
    let mut image = opened.identify_as(&registry, request.format.as_deref())?;
    check_immediate_parent(&registry, &image, &gate)?;
    open_extra_files(&registry, &mut [FilesOf { image: &mut image, access, changes: false, gate: &gate }])?;
    // For good: what is returned is only what was in force.
    let _ = confinement.seal(Work::Read);

    let format = image.facts.format.to_string();
    let all = open_chain_devices_ro(vec![image])?;
    let modules = all.modules();
    let ChainDevices { devices, members, files, paths, .. } = all;
    let spec = VmSpec { files, ..VmSpec::new(Vec::new(), members, modules) }.with_operation(vm::CHECK);
    let mut handler = CheckHandler::new(devices);
    let ended = kvm.and_then(|kvm| vm::run_on(&kvm, &spec, &mut handler));
    log.extend_from_slice(handler.log.lines());
    let failure = match (ended, handler.result.take()) {
        (Ok(_), Some(Ok(found))) => return Ok(CheckResult { format, found, findings: handler.findings }),
        (Ok(_), Some(Err(failure))) => failure,
        (Ok(_), None) => GuestFailure::ended(ErrorCode::GuestProtocol, "the guest ended without a result"),
        (Err(error), _) => GuestFailure::of_machine(&error),
    };
    Err(map_read_error(&failure, &paths))
}
