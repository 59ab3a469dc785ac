//! `instar commit`: from two file names to a merged pair.
//!
//! Everything up to [`run_commit_guest`] only looks: a commit that is refused on the way leaves both files
//! byte-identical. So does one that the guest refuses in its steps "check" and "plan".

mod attach;
mod error;
mod guest;
pub(crate) mod handler;
mod interrupt;
mod notes;
mod plan;
mod progress;
mod render;
mod repeated;
mod space;
mod timing;

pub use attach::{open_chain_devices_ro, open_chain_devices_rw, ChainDevices, DevicePaths, Slot};
pub use error::{map_commit_error, map_read_error, Changed, GuestFailure};
pub use guest::{run_commit_guest, Acquired, CommitChain, Growth, GuestOptions, GuestRun};
pub use handler::CommitHandler;
pub use notes::{Announcement, Notes};
pub use plan::PlanBounds;
pub use render::{render_commit_error, render_commit_success, render_dry_run, render_verbose, render_warning};
pub use timing::Timing;

use crate::confine::{Confinement, Work};
use crate::devices::{Cache, Workers};
use crate::error::{Error, Role};
use crate::escape::escape_path;
use crate::image::{
    allow_many_open_files, check_parents, open_extra_files, prepare_to_lock, resolve_backing, Access, BackingChoice,
    ChainImage, Descent, FilesOf, Gate, NamedFile, Roots, Target,
};
use crate::plugins::{Registry, SearchPath};
use crate::vm::KvmDevice;
use instar_guest_abi::{ErrorCode, ERROR_OK, MAX_CHAIN_DEVICES};
use instar_guest_protocol::CommitConfig;
use instar_plugin_api::{CommitRole, ImageFacts, ROLE_SINK, ROLE_SOURCE};
use repeated::Repeated;
use std::path::{Path, PathBuf};

/// What the operator asks for.
#[derive(Clone, Debug, Default)]
pub struct CommitRequest {
    /// The overlay.
    pub overlay: PathBuf,
    /// The overlay's format, if the operator names it.
    pub format: Option<String>,
    /// The image to commit into, if the operator names it.
    pub base: Option<PathBuf>,
    /// The format of the image to commit into, if the operator names it.
    pub base_format: Option<String>,
    /// Leave the overlay's content in place.
    pub keep_overlay: bool,
    /// Stop before the first change.
    pub dry_run: bool,
    /// Let a smaller backing grow to the overlay's virtual size.
    pub resize_backing: bool,
    /// Bytes per second that are moved at most; 0 for no limit.
    pub rate_limit: u64,
    /// What flushes and writes promise.
    pub cache: Cache,
    /// Show progress on stderr.
    pub progress: bool,
    /// Seconds to wait for images that are in use.
    pub wait: u64,
    /// Directories that recorded names may lead into.
    pub allowed_directories: Vec<PathBuf>,
    /// Where plugins are looked for.
    pub search: SearchPath,
}

/// How a commit went.
#[derive(Clone, Debug)]
pub struct CommitRunResult {
    /// Absolute path of the overlay.
    pub overlay: PathBuf,
    /// The same as the operator gave it.
    pub overlay_given: PathBuf,
    /// Its format.
    pub overlay_format: String,
    /// Absolute path of the backing.
    pub backing: PathBuf,
    /// Its format.
    pub backing_format: String,
    /// Overlay clusters that were committed, zero clusters included.
    pub clusters_committed: u64,
    /// Their guest-visible bytes.
    pub bytes_committed: u64,
    /// Overlay clusters that were dropped by emptying it.
    pub overlay_clusters_cleared: u64,
    /// The virtual size in bytes to which the backing grows, if it does.
    pub backing_grows_to: Option<u64>,
    /// Whether nothing was changed, as asked.
    pub dry_run: bool,
    /// The layers between overlay and backing: they read differently afterwards, because the image below them changes.
    pub stale: Vec<PathBuf>,
    /// What the operator should know, each one line that names a file. [`Notes`] had them before the first change.
    pub warnings: Vec<String>,
    /// What the virtual machine did.
    pub run: GuestRun,
    /// How long each part took.
    pub timing: Timing,
}

/// Open the overlay, lock it, and find out what it is.
///
/// # Errors
/// [`ErrorCode::ImageNotFound`], [`ErrorCode::OpenFailed`], [`ErrorCode::ImageInUse`], and an unknown or wrong format.
pub fn probe_commit_target<'r>(
    registry: &'r Registry,
    file: &NamedFile,
    format_hint: Option<&str>,
    access: Access,
) -> Result<ChainImage<'r>, Error> {
    let opened = file.open(access, ErrorCode::ImageNotFound)?.lock(access)?;
    opened.identify_overlay(registry, format_hint)
}

/// An overlay's file that is shorter than this, in bytes, holds too little to be copied by several threads.
const MUCH: u64 = 4 << 20;

/// Threads that copy side by side, where there may be much to copy: in the overlay, or in the layers below it, which nobody
/// has looked at yet.
fn workers(request: &CommitRequest, overlay: &NamedFile) -> Option<Workers> {
    let long = || overlay.is_block_device() || overlay.length().is_some_and(|length| length >= MUCH);
    if request.dry_run || request.rate_limit > 0 || !(request.base.is_some() || long()) {
        return None;
    }
    // Without them, one thread does it all.
    Workers::start().ok()
}

/// Commit an overlay into its backing. `notes` takes the lines for `-v` about what was loaded and resolved, also of a
/// commit that is refused.
///
/// The calling process is [confined](crate::confine) by it, for good: it can do little afterwards but print and end.
///
/// # Errors
/// One line that names the file and what to do.
pub fn run_commit(request: &CommitRequest, notes: &mut Notes) -> Result<CommitRunResult, Error> {
    let role_of = |path: &Path| if path == request.overlay { Role::Overlay } else { Role::Backing };
    commit_in_order(request, notes).map_err(|error| match error.path().map(role_of) {
        Some(role) => error.in_role(role),
        None => error,
    })
}

fn commit_in_order(request: &CommitRequest, notes: &mut Notes) -> Result<CommitRunResult, Error> {
    let mut timing = Timing::start();
    interrupt::install();
    allow_many_open_files();
    // From here on, the directories that names may lead into are descriptors: no path leads to them a second time.
    let file = NamedFile::new(&request.overlay);
    let base = request.base.as_deref().map(|base| NamedFile::beside(&file, base));
    let roots = Roots::of(&file, &request.allowed_directories)?;
    // Whoever names a base wants what belongs to it as well, which lies beside it.
    let with_base = base.as_ref().map_or_else(|| roots.clone(), |base| roots.and(base));
    let registry = Registry::load(&request.search);
    notes.plugins(&registry);
    Error::if_refused(&registry)?;
    timing.mark("plugins loaded");
    let acquired = Acquired { kvm: KvmDevice::open(), workers: workers(request, &file) };
    timing.mark("KVM opened, threads started");
    // A dry run asks for no more than it needs: anybody who may read the images can ask what would become of them.
    let access = if request.dry_run { Access::ReadOnly } else { Access::ReadWrite };
    prepare_to_lock(request.wait, std::iter::once(&file).chain(&base), &request.allowed_directories);
    // Which of the files in these directories are images, and which are to be written, only the images say.
    let named = [Some(&file), base.as_ref()].map(|file| file.and_then(NamedFile::descriptor));
    let reach = with_base.reach(access);
    let reach = named.iter().flatten().fold(reach, |reach, file| reach.add(file, access == Access::ReadWrite));
    let confinement = Confinement::begin(&reach, Work::OpenToCommit);
    notes.push(|| format!("confinement: {confinement}"));
    timing.mark("process confined");

    let mut overlay = probe_commit_target(&registry, &file, request.format.as_deref(), access)?;
    notes.image("overlay", &overlay);
    let (gate, below) = (Gate::within(roots), Gate::within(with_base));
    // All but the backing have a slot.
    let mut descent = Descent::new(&registry, &below, file.path(), MAX_CHAIN_DEVICES);
    let choice = BackingChoice { base: base.as_ref(), format: request.base_format.as_deref(), access };
    let target = resolve_backing(&mut descent, &overlay, choice)?;
    target.between.iter().for_each(|layer| notes.image("merged, too", layer));
    notes.image("backing", &target.backing);
    let mut ancestors =
        descent.open_below(&target.backing, Access::ReadOnly).map_err(|error| error.in_role(Role::Ancestor))?;
    let Target { mut backing, mut between } = target;
    overlay.follows = !request.dry_run && between.is_empty() && overlay.facts.follows(&backing.facts);
    let mut images = vec![FilesOf { image: &mut overlay, access, changes: true, gate: &gate }];
    images.push(FilesOf { image: &mut backing, access, changes: true, gate: &below });
    let only_read = between.iter_mut().chain(&mut ancestors);
    images.extend(only_read.map(|image| FilesOf { image, access: Access::ReadOnly, changes: false, gate: &below }));
    open_extra_files(&registry, &mut images)?;
    ancestors.iter().for_each(|ancestor| notes.image("below it", ancestor));
    let [overlay_path, backing_path] = [&overlay, &backing].map(|image| image.opened.settled_path());
    let mut warnings = Vec::new();
    if request.dry_run {
        [&overlay, &backing].into_iter().try_for_each(|image| image.opened.check_writable())?;
        warnings.extend([&overlay, &backing].into_iter().filter_map(|image| not_writable(&image.opened.path)));
    }
    timing.mark("chain opened, locked and probed");
    let confinement = confinement.seal(Work::Commit);
    notes.push(|| format!("confinement, now that all images are open: {confinement}"));
    timing.mark("process confined further");

    let chain: Vec<&ChainImage<'_>> =
        std::iter::once(&overlay).chain(&between).chain([&backing]).chain(&ancestors).collect();
    check_parents(&chain)?;
    may_be_repeated(request, &overlay, &backing)?;
    let max_length = verdict(&overlay, &between, &backing, &ancestors, &mut warnings)?;
    let backing_grows_to = check_sizes(&overlay, &backing, request.resize_backing)?;
    if let Some(size) = backing_grows_to {
        notes.push(|| format!("the backing's virtual size grows to {size} bytes"));
    }
    let stale: Vec<PathBuf> = between.iter().map(|layer| layer.opened.path.clone()).collect();
    warnings.extend(become_stale(&stale, request.dry_run));
    let announcement = notes.announcement(&warnings);
    let mut result = CommitRunResult {
        overlay: overlay_path,
        overlay_given: request.overlay.clone(),
        overlay_format: overlay.facts.format.to_string(),
        backing: backing_path,
        backing_format: backing.facts.format.to_string(),
        clusters_committed: 0,
        bytes_committed: 0,
        overlay_clusters_cleared: 0,
        backing_grows_to,
        dry_run: request.dry_run,
        stale,
        warnings,
        run: GuestRun::default(),
        timing,
    };
    let CommitRequest { rate_limit, cache, progress, dry_run, resize_backing, .. } = *request;
    let keep_overlay = request.keep_overlay || !between.is_empty();
    let config = CommitConfig { dry_run, resize_backing };
    let options = GuestOptions { config, keep_overlay, max_length, rate_limit, cache, progress };
    let chain = CommitChain { overlay, between, backing, ancestors };
    let (outcome, run) = run_commit_guest(options, acquired, chain, announcement, notes)?;
    result.timing.mark("virtual machine");
    result.clusters_committed = outcome.clusters_committed;
    result.bytes_committed = outcome.bytes_committed;
    result.overlay_clusters_cleared = outcome.overlay_clusters_cleared;
    result.run = run;
    Ok(result)
}

/// The line about layers that were merged and stay, which is said before that happens.
fn become_stale(layers: &[PathBuf], dry_run: bool) -> Option<String> {
    let first = escape_path(layers.first()?);
    let (others, it) = match layers.len() - 1 {
        0 => (String::new(), "it"),
        others => (format!(" and {others} more of the layers that are merged"), "them"),
    };
    let verb = match (dry_run, layers.len()) {
        (true, _) => "would become",
        (false, 1) => "becomes",
        (false, _) => "become",
    };
    Some(format!(
        "'{first}'{others}: {verb} stale, because the image below changes: delete {it} afterwards, or rebase the images \
         that depend on {it}"
    ))
}

/// The line of a dry run about a file that it can read, and a commit could not write.
fn not_writable(path: &Path) -> Option<String> {
    use rustix::fs::{accessat, Access, AtFlags, CWD};
    let error = accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).err()?;
    let (path, why) = (escape_path(path), crate::error::reason(&error.into()));
    Some(format!("'{path}': you may not write to it, which the commit itself needs: {why}"))
}

/// Refuse a backing that is not believed to be raw, unless the commit may be the repetition of one that made it look so: of
/// that, only its writes are proof, which a dry run has none of.
fn may_be_repeated(request: &CommitRequest, overlay: &ChainImage<'_>, backing: &ChainImage<'_>) -> Result<(), Error> {
    let Some(doubt) = &backing.doubt else { return Ok(()) };
    // The first run has made it as long as it has to be.
    let fits = overlay.facts.virtual_size <= backing.facts.virtual_size;
    if fits && !request.dry_run && Repeated::new(&doubt.mark).is_some() {
        return Ok(());
    }
    Err(Error::image(&backing.opened.path, ErrorCode::FormatMismatch, &doubt.clause))
}

/// Ask each plugin for its verdict. Returns how long the backing may become in bytes; `warnings` takes what the plugins have to
/// say besides.
fn verdict(
    overlay: &ChainImage<'_>,
    between: &[ChainImage<'_>],
    backing: &ChainImage<'_>,
    ancestors: &[ChainImage<'_>],
    warnings: &mut Vec<String>,
) -> Result<u64, Error> {
    let mut ask = |image: &ChainImage<'_>, role: CommitRole, other: &ImageFacts| {
        let (needed, part) = match role {
            CommitRole::Overlay => (ROLE_SOURCE, "committed"),
            CommitRole::Backing => (ROLE_SINK, "committed into"),
            CommitRole::Ancestor => (ROLE_SOURCE, "read below a backing"),
        };
        if image.plugin.roles() & needed == 0 {
            let clause = format!("an image cannot be {part} with this version of the {} plugin", image.plugin.name());
            return Err(Error::image(&image.opened.path, ErrorCode::UnsupportedFormat, clause));
        }
        let verdict = image.plugin.verdict(role, &image.facts, other);
        if verdict.code != ERROR_OK {
            let code = ErrorCode::from_u32(verdict.code).unwrap_or(ErrorCode::PluginRefused);
            return Err(Error::image(&image.opened.path, code, verdict.reason.as_str()));
        }
        if !verdict.reason.is_empty() {
            warnings.push(format!("'{}': {}", escape_path(&image.opened.path), verdict.reason));
        }
        Ok(verdict.max_length)
    };
    let merged: Vec<&ChainImage<'_>> = std::iter::once(overlay).chain(between).collect();
    for (index, layer) in merged.iter().enumerate() {
        ask(layer, CommitRole::Overlay, &merged.get(index + 1).unwrap_or(&backing).facts)?;
    }
    let mut max_length = 0;
    for facts in arriving(overlay, between) {
        max_length = max_length.max(ask(backing, CommitRole::Backing, &facts)?);
    }
    let below: Vec<&ChainImage<'_>> = std::iter::once(backing).chain(ancestors).collect();
    for (index, image) in below.iter().enumerate() {
        let parent = below.get(index + 1);
        // The backing itself is asked whether it goes with its parent.
        if index > 0 || parent.is_some() {
            ask(image, CommitRole::Ancestor, &parent.unwrap_or(image).facts)?;
        }
    }
    Ok(max_length.max(backing.facts.file_length))
}

/// Facts of the layers that are committed, as a backing's verdict is asked with each of them: the length of the file is
/// that of all together.
fn arriving(overlay: &ChainImage<'_>, between: &[ChainImage<'_>]) -> Vec<ImageFacts> {
    let size = overlay.facts.virtual_size;
    let layers = || std::iter::once(overlay).chain(between);
    let mut length = layers().fold(0, |sum: u64, layer| sum.saturating_add(layer.facts.file_length));
    // The zeroes that a shorter layer stands for past its end take no room in any file: as if they were data.
    if between.iter().any(|layer| layer.facts.virtual_size < size) {
        length = length.saturating_add(size);
    }
    let with_length = |layer: &ChainImage<'_>| {
        let largest = layer.facts.virtual_size.min(size);
        ImageFacts { file_length: length, virtual_size: largest, ..layer.facts.clone() }
    };
    layers().map(with_length).collect()
}

/// The virtual size in bytes to which the backing has to grow, if it has to and may.
fn check_sizes(overlay: &ChainImage<'_>, backing: &ChainImage<'_>, may_grow: bool) -> Result<Option<u64>, Error> {
    let (needed, size) = (overlay.facts.virtual_size, backing.facts.virtual_size);
    if needed <= size {
        return Ok(None);
    }
    if may_grow {
        return Ok(Some(needed));
    }
    let advice = if backing.opened.block_device && backing.facts.cluster_size <= 1 {
        "enlarge the device first"
    } else {
        "give --resize-backing, if images of its format can grow, or grow the backing first"
    };
    let clause =
        format!("the overlay's virtual size of {needed} bytes exceeds backing virtual size of {size} bytes: {advice}");
    Err(Error::image(&overlay.opened.path, ErrorCode::OverlayLargerThanBacking, clause))
}
