//! The steps of a commit, in their order.

use super::attach::open_chain_devices_rw;
use super::backing::resolve_backing;
use super::error::CommitError;
use super::guest::run_commit_guest;
use super::options::CommitOptions;
use super::probe::probe_commit_target;
use super::result::CommitRunResult;
use super::trace::Trace;
use super::verdict::give_verdicts;
use crate::chain::{discover_backing_chain, ChainImage, Gate, ImageDirectory};
use crate::cli::escape::escape_path;
use crate::devices::lock::Locked;
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;
use std::path::{Path, PathBuf};

/// The slots of the chain that the guest may write: emptying the overlay needs it.
const RW_SLOTS: &[usize] = &[0];

/// Commit an overlay into its backing.
///
/// # Errors
/// Why it was refused, and nothing was changed; or why it failed, and in which state the files are.
pub fn run_commit(
    options: &CommitOptions,
    registry: &Registry,
    trace: &mut Trace,
) -> Result<CommitRunResult, CommitError> {
    let overlay = probe_commit_target(registry, &options.overlay, options.format.as_deref())?;
    tell(trace, "overlay", &overlay);
    trace.lap("open, lock and probe overlay");

    let gate = allowed_directories(&options.allowed_directories)?;
    let backing = resolve_backing(registry, &overlay, options.base.as_deref(), &gate)?;
    tell(trace, "backing", &backing);
    let taken = [overlay.file.identity(), backing.file.identity()];
    let ancestors = discover_backing_chain(registry, &backing, &taken, &gate.with(&overlay.directory))?;
    for ancestor in &ancestors {
        tell(trace, "ancestor", ancestor);
    }
    trace.lap("open, lock and probe the chain");

    let max_length = give_verdicts(&overlay, &backing, &ancestors)?;
    trace.line(format_args!("verdict: supported, the backing may become at most {max_length} bytes long"));
    let (overlay_path, backing_path) = (absolute(&overlay)?, absolute(&backing)?);
    let (overlay_format, backing_format) = (overlay.plugin.name().to_owned(), backing.plugin.name().to_owned());
    let layers = std::iter::once(overlay).chain(ancestors).collect();
    let attached = open_chain_devices_rw(layers, backing, max_length, RW_SLOTS)?;
    trace.lap("verdict");
    trace.line("confinement: none yet");

    let run = run_commit_guest(attached, 0, options.cache, trace)?;
    Ok(CommitRunResult {
        overlay: overlay_path,
        overlay_format,
        backing: backing_path,
        backing_format,
        clusters_committed: run.clusters_committed,
        bytes_committed: run.bytes_committed,
        overlay_clusters_cleared: run.overlay_clusters_cleared,
    })
}

fn allowed_directories(paths: &[PathBuf]) -> Result<Gate, CommitError> {
    let open = |path: &PathBuf| {
        ImageDirectory::new(path).map_err(|error| {
            let clause = format!("the directory of --allow-backing-dir cannot be used: {error}");
            CommitError::image(path, ErrorCode::OpenFailed, clause)
        })
    };
    Ok(Gate { allowed: paths.iter().map(open).collect::<Result<_, _>>()? })
}

/// The absolute path of an image: of its name, that is, and not of where a link leads.
fn absolute(image: &ChainImage<'_>) -> Result<PathBuf, CommitError> {
    let path = image.path();
    let name = path.file_name().map_or(Path::new(""), Path::new);
    if name.as_os_str().is_empty() {
        return Err(CommitError::image(path, ErrorCode::OpenFailed, "is not the name of a file"));
    }
    Ok(image.directory.canonical().join(name))
}

fn tell(trace: &Trace, part: &str, image: &ChainImage<'_>) {
    let locked = if image.locked == Locked::Held { "" } else { ", not locked: its file system has no locks" };
    trace.line(format_args!(
        "{part}: '{}': {}, virtual size {} bytes, clusters of {} bytes, {} bytes long{locked}",
        escape_path(image.path()),
        image.plugin.name(),
        image.facts.virtual_size,
        image.facts.cluster_size,
        image.file.initial_length()
    ));
}
