//! The commit as an [`Operation`]: it opens the images, asks the plugins before it begins, and reports the result.

use super::admitted::Admitted;
use super::atomic::{Atomic, AtomicWay};
use super::bitmaps::{allowance, count as bitmaps_of, left_out};
use super::changed::Changed;
use super::delete::{self, Deletion};
use super::digest::{self, Digests};
use super::events::CommitEvents;
use super::meter::Meter;
use super::outcome::{CommitOutcome, GuestRun, Preview};
use super::plan::PlanBounds;
use super::refusals::{is_sibling, not_writable, nothing_to_commit};
use super::relinks::{self, Relinked, Relinks};
use super::repeated::Repeated;
use super::request::{CommitMode, CommitRequest};
use super::siblings::Siblings;
use super::space::{block_size, free_in, free_space, no_space, taken_space, Space};
use super::undo_room::log_room;
use super::verdict::{become_stale, Parts};
use super::verify::{self, Verification};
use super::wipe;
use crate::confine::{Reach, Work};
use crate::devices::{Device, Devices, Workers};
use crate::error::{Error, Role};
use crate::escape::{escape_bytes, escape_path};
use crate::image::{
    check_parents, open_extra_files, parent_is_unrecorded, resolve_backing, undo_directory, Access, BackingChoice,
    ChainImage, Descent, FilesOf, Gate, NamedFile, Target,
};
use crate::lookup::Directory;
use crate::operation::{
    DevicePaths, Ended, Grants, GuestFailure, ImageSet, Named, NamedDirectory, Opener, Operation, Session, Settings,
    Slot,
};
use crate::plugins::Registry;
use crate::sandbox::ModuleSpec;
use instar_guest_abi::{ErrorCode, MemberRole, Phase, DEVICE_OUTPUT, MAX_CHAIN_DEVICES, PAYLOAD_SIZE};
use instar_guest_protocol::commit::Config;
use instar_guest_protocol::Message;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// The bound on the messages of a commit that reads nothing back, in bytes.
const MESSAGES: u64 = 16 << 20;

/// A commit in progress.
pub struct Commit<'q> {
    request: &'q CommitRequest,
    /// Threads that copy in parallel, if there is much to copy and the system permits them.
    workers: Option<Workers>,
    /// The lines of a dry run about files that a commit could not write.
    warnings: Vec<String>,
    /// Other images that the commit would damage.
    siblings: Option<Siblings>,
    /// Absolute paths of the overlay and the backing.
    paths: (PathBuf, PathBuf),
    /// The overlay's children that the commit relinks to the backing, or that name it already.
    relinked: Vec<Relinked>,
    /// The overlay's name, if it will be removed.
    deletion: Option<Result<Deletion, Error>>,
    /// The bound on the messages of reading back, in bytes.
    message_limit: u64,
    admitted: Option<Admitted>,
    /// The state of `--atomic`, with which the target changes completely or not at all.
    atomic: Option<Atomic>,
    /// The way in which the old target is kept.
    way: Option<AtomicWay>,
    /// Free bytes in the directory of its undo log, if that is another one.
    undo_free: Option<u64>,
    /// The old target's name afterwards.
    backup: Option<PathBuf>,
    /// Directories besides those of the images in which the target may lie.
    target_directories: Vec<Directory>,
}

impl<'q> Commit<'q> {
    /// Make a commit that has not begun.
    #[must_use]
    pub fn new(request: &'q CommitRequest) -> Self {
        Self {
            request,
            workers: None,
            warnings: Vec::new(),
            siblings: None,
            paths: Default::default(),
            relinked: Vec::new(),
            deletion: None,
            message_limit: MESSAGES,
            admitted: None,
            atomic: None,
            way: None,
            undo_free: None,
            backup: None,
            target_directories: Vec::new(),
        }
    }

    /// The first child that names the target already. As long as the overlay holds data, nothing proves that an earlier
    /// run relinked the child: it may have been on the target all along.
    fn settled(&self) -> Option<&Path> {
        self.relinked.iter().find(|child| child.already).map(|child| child.image.as_path())
    }

    /// Start threads that copy in parallel, if there may be much to copy: in the overlay, or in the layers below it,
    /// which are not open yet.
    fn workers(&self, overlay: &NamedFile) -> Option<Workers> {
        let long = || overlay.is_block_device() || overlay.length().is_some_and(|length| length >= Workers::MUCH);
        let CommitRequest { rate_limit, base, .. } = self.request;
        if self.request.only_plans() || *rate_limit > 0 || !(base.is_some() || long()) {
            return None;
        }
        // Without them, one thread does it all.
        Workers::start().ok()
    }
}

impl Operation for Commit<'_> {
    type Events = CommitEvents;
    type Outcome = CommitOutcome;

    fn module(&self) -> ModuleSpec<'static> {
        super::MODULE
    }

    fn work(&self) -> (Work, Work) {
        match self.request.atomic {
            true => (Work::OpenToCommitAtomically, Work::CommitAtomically),
            false => (Work::OpenToCommit, Work::Commit),
        }
    }

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        let image = NamedFile::new(&self.request.overlay);
        let base = self.request.base.as_deref().map(|base| NamedFile::beside(&image, base));
        let children = self.request.relink.iter().map(|child| NamedFile::new(child)).collect();
        let child_directories = self.request.relink_in.iter().map(|directory| NamedDirectory::new(directory)).collect();
        Named { image, base, second: None, others: Vec::new(), children, child_directories }
    }

    fn access(&self) -> Access {
        // A dry run opens images for reading only, so that anybody who may read them can ask what a commit would do.
        if self.request.only_plans() {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        }
    }

    fn acquire(&mut self, named: &Named, _: &Registry) {
        self.workers = self.workers(&named.image);
        self.deletion = self.request.delete_overlay.then(|| Deletion::begin(&named.image)).flatten();
        if self.request.atomic {
            self.target_directories.extend(named.base.as_ref().and_then(NamedFile::real_directory));
            self.target_directories.extend(undo_directory().map(|undo| undo.directory().clone()));
        }
    }

    fn reach_of_names<'n>(&'n self, roots: &'n [Directory], reach: Reach<'n>) -> Reach<'n> {
        match (&self.atomic, self.request.atomic) {
            (Some(atomic), _) => reach.add_names(atomic.directory()),
            (None, false) => reach,
            // Only the images show which way it will be. A dry run tries the clone as well.
            (None, true) => {
                let all = roots.iter().chain(&self.target_directories);
                all.fold(reach, |reach, directory| reach.add(directory, true).add_names(directory))
            }
        }
    }

    fn removes_in(&self) -> Option<BorrowedFd<'_>> {
        let deletion = self.deletion.as_ref().filter(|_| !self.request.only_plans())?;
        deletion.as_ref().ok().map(Deletion::directory)
    }

    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
        let Opener { registry, session, named, gate, below, access, .. } = *opener;
        let opened = named.image.open(access, ErrorCode::ImageNotFound)?.lock(access)?;
        let mut overlay = opened.identify_overlay(registry, self.request.format.as_deref())?;
        session.note_image("overlay", &overlay);
        // All but the backing have a slot.
        let mut descent = Descent::new(registry, below, named.image.path(), MAX_CHAIN_DEVICES);
        let format = self.request.base_format.as_deref();
        let choice = BackingChoice { base: named.base.as_ref(), format, access };
        let Target { mut backing, mut between, stands_in } = resolve_backing(&mut descent, &overlay, choice)?;
        if stands_in {
            let (child, file) = (between.last().unwrap_or(&overlay), &backing.opened.path);
            let (child, file) = (escape_path(&child.opened.path), escape_path(file));
            self.warnings.push(format!(
                "'{child}' does not lead to '{file}', whose identity alone proves that it is the parent: to read it, give that \
                 file the name that `instar info` shows as its backing file"
            ));
        }
        if parent_is_unrecorded(&overlay.facts) {
            let [child, file] = [&overlay, &backing].map(|image| escape_path(&image.opened.path));
            self.warnings.push(format!(
                "'{child}' records nothing of its parent: only -b says that it is '{file}', and a commit into another image \
                 destroys both"
            ));
        }
        between.iter().for_each(|layer| session.note_image("merged, too", layer));
        session.note_image("backing", &backing);
        let mut ancestors =
            descent.open_below(&backing, Access::ReadOnly).map_err(|error| error.in_role(Role::Ancestor))?;
        let chain: Vec<&ChainImage<'_>> =
            std::iter::once(&overlay).chain(&between).chain(std::iter::once(&backing)).chain(&ancestors).collect();
        let relinks = Relinks::open(opener, &chain, between.len() + 1).map_err(|error| error.in_role(Role::Child))?;
        let Relinks { images: mut children, all, warnings } = relinks;
        if self.request.delete_overlay {
            let remedy = "have them name the target with --relink, or leave out --delete-overlay";
            delete::refuse_children(opener, &chain, &children, remedy)?;
        }
        self.warnings.extend(warnings);
        self.relinked = all;
        overlay.follows = !self.request.only_plans() && between.is_empty() && overlay.has_to_follow(&backing);
        let mut images = vec![FilesOf { image: &mut overlay, access, changes: true, gate }];
        images.push(FilesOf { image: &mut backing, access, changes: true, gate: below });
        let only_read = between.iter_mut().chain(&mut ancestors);
        images.extend(only_read.map(|image| FilesOf { image, access: Access::ReadOnly, changes: false, gate: below }));
        let beside =
            children.iter().map(|child| Gate::beside(&child.opened.directory)).collect::<Result<Vec<_>, _>>()?;
        let of_children = children.iter_mut().zip(&beside);
        images.extend(of_children.map(|(image, gate)| FilesOf {
            image,
            access: Access::ReadOnly,
            changes: false,
            gate,
        }));
        open_extra_files(registry, &mut images)?;
        ancestors.iter().for_each(|ancestor| session.note_image("below it", ancestor));
        // A question for the space that it takes damages nothing.
        if self.request.mode != CommitMode::Measure {
            let above: Vec<&ChainImage<'_>> = std::iter::once(&overlay).chain(&between).collect();
            self.siblings = Siblings::find(opener, &above, &backing, &ancestors, |_| false)?;
        }
        self.paths = (overlay.opened.settled_path(), backing.opened.settled_path());
        if self.request.only_plans() {
            [&overlay, &backing].into_iter().try_for_each(|image| image.opened.check_writable())?;
            let of_child = |error: Error| error.in_role(Role::Child);
            children.iter().try_for_each(|child| child.opened.check_writable().map_err(of_child))?;
            let written = [&overlay, &backing].into_iter().chain(&children);
            self.warnings.extend(written.filter_map(|image| not_writable(&image.opened.path)));
        }
        for (child, Relinked { backing, .. }) in
            children.iter().zip(self.relinked.iter().filter(|child| !child.already))
        {
            session.note_image("child", child);
            session
                .note(|| format!("child {} will record '{}'", escape_path(&child.opened.path), escape_bytes(backing)));
        }
        if self.request.atomic {
            let backup = self.request.keep_backup.as_deref();
            let atomic = Atomic::begin(&mut backing, (&overlay, &between), backup)
                .map_err(|error| error.in_role(Role::Backing))?;
            session.note(|| format!("the target changes whole or not at all: {atomic}"));
            self.undo_free =
                undo_directory().filter(|_| backing.opened.block_device).and_then(|undo| free_in(undo.listed()));
            self.backup = backup.map(|backup| atomic.directory().path().join(backup));
            self.atomic = Some(atomic);
        }
        let kept = self.request.keeps_content() || !between.is_empty();
        let top = if kept { MemberRole::Read } else { MemberRole::Empty };
        let between = between.into_iter().map(|layer| Slot::new(MemberRole::Read, layer));
        let ancestors = ancestors.into_iter().map(|layer| Slot::new(MemberRole::Below, layer));
        let children = children.into_iter().map(|child| Slot::new(MemberRole::Relinked, child));
        let slots = std::iter::once(Slot::new(top, overlay)).chain(between).chain(ancestors).chain(children).collect();
        Ok(ImageSet { slots, target: Some(backing), ..ImageSet::default() })
    }

    fn admit(&mut self, images: &mut ImageSet<'_>, session: &Session) -> Result<Grants, Error> {
        check_parents(&images.chain())?;
        let parts = Parts::of(images).ok_or_else(nothing_to_commit)?;
        parts.refuse_doubt(self.request.only_plans())?;
        // A device of plain bytes is itself the disk: lengthening the one makes the other grow.
        let is_disk = parts.backing.opened.block_device && parts.backing.facts.cluster_size <= 1;
        let may_grow = self.request.resize_backing || (self.request.mode == CommitMode::Measure && is_disk);
        // A plugin's refusal comes first.
        let growth = parts.growth(may_grow);
        let mut grants = parts.verdict(growth.as_ref().ok().copied().flatten(), &mut self.warnings)?;
        let backing_grows_to = growth?;
        if self.request.bitmaps {
            let size = backing_grows_to.unwrap_or(0).max(parts.backing.facts.virtual_size);
            let merged = parts.merged().map(|layer| &layer.facts);
            grants.target = grants.target.saturating_add(allowance(&parts.backing.facts, merged, size));
        } else if self.request.mode != CommitMode::Measure {
            self.warnings.extend(left_out(&parts));
        }
        if !parts.empties && !self.request.relink_in.is_empty() {
            let clause = "keeps its content, so that after an interrupted commit nothing would tell its children from other images \
                          on the target: name them with --relink, and not with --relink-in";
            return Err(Error::image(&parts.overlay.opened.path, ErrorCode::BackingShared, clause));
        }
        if self.request.wipe {
            wipe::admit(self.request, &parts)?;
            self.warnings.extend(wipe::warning(&parts));
        }
        if self.request.verify {
            verify::admit(self.request)?;
            self.message_limit = self.message_limit.saturating_add(verify::message_limit(&parts));
        }
        if self.request.digest {
            digest::admit(self.request, &parts)?;
        }
        if let Some(deletion) = self.deletion.take().transpose()? {
            deletion.admit(self.request, &parts, &mut self.warnings)?;
            self.deletion = Some(Ok(deletion));
        }
        let children = images.of_role(|role| role == MemberRole::Relinked);
        relinks::admit(children, &parts, backing_grows_to, &mut self.warnings)?;
        let wanted = Relinks::wanted(&self.relinked, parts.backing);
        if let Some(siblings) = &self.siblings {
            match (self.request.ignore_siblings, self.request.relinks()) {
                (true, _) => self.warnings.push(siblings.warning(self.request.only_plans())),
                (false, false) => return Err(siblings.refusal()),
                // They may be children that an earlier run has relinked: only the plan says whether they are damaged.
                (false, true) => {}
            }
        }
        grants.beyond_devices = self.request.mode == CommitMode::Measure;
        self.warnings.extend(parts.unsure_mark());
        if let Some(size) = backing_grows_to {
            session.note(|| format!("the backing's virtual size grows to {size} bytes"));
        }
        let stale: Vec<PathBuf> = parts.between.iter().map(|layer| layer.opened.path.clone()).collect();
        self.warnings.extend(become_stale(&stale, self.request.only_plans()));
        let Parts { overlay, backing, .. } = &parts;
        let formats = (overlay.facts.format.to_string(), backing.facts.format.to_string());
        self.admitted = Some(Admitted {
            formats,
            keep_overlay: self.request.keeps_content() || !stale.is_empty(),
            stale,
            backing_grows_to,
            bounds: PlanBounds { longest: grants.target, ..PlanBounds::of(overlay, backing) },
            space: Space::of(backing, &parts.merged().collect::<Vec<_>>()),
            doubt: None,
            wanted,
            overlay_length: overlay.length(),
            virtual_size: overlay.facts.virtual_size,
            bitmaps: parts.merged().chain([*backing]).map(|image| bitmaps_of(&image.facts)).sum(),
            repairs: backing.facts.dirty,
            length: backing.facts.file_length,
            // A clone's changes are not the target's own.
            taken: if self.atomic.as_ref().is_some_and(Atomic::is_clone) { Some(0) } else { taken_space(backing) },
            free: free_space(backing),
            sources: self.atomic.as_ref().map_or(0, Atomic::sources),
            block: block_size(backing),
        });
        if self.payload().len() as u64 > PAYLOAD_SIZE {
            let clause = "has too many children in too many directories to relink at a time: name some of them with --relink, and \
                          the others in a second run";
            return Err(Error::image(&self.paths.0, ErrorCode::ChainTooDeep, clause));
        }
        if let (Some(admitted), Some(backing)) = (&mut self.admitted, &mut images.target) {
            admitted.doubt = backing.doubt.take();
        }
        Ok(grants)
    }

    fn payload(&self) -> Vec<u8> {
        let resize_backing = self.admitted.as_ref().is_some_and(|admitted| admitted.backing_grows_to.is_some());
        let relinked = self.admitted.as_ref().and_then(|admitted| admitted.wanted.clone());
        let bitmaps = self.request.bitmaps;
        let dry_run = self.request.only_plans();
        let verify = self.request.verify && !dry_run;
        let CommitRequest { atomic: announce_complete, digest, detect_zeroes, .. } = *self.request;
        Config { dry_run, resize_backing, relinked, bitmaps, announce_complete, verify, digest, detect_zeroes }
            .encode_to_vec()
    }

    fn message_limit(&self) -> u64 {
        self.message_limit
    }

    fn serve(&mut self, devices: &mut Devices, paths: &DevicePaths, session: &Session) -> Result<CommitEvents, Error> {
        let others = self.siblings.is_some() || self.settled().is_some();
        let has_siblings = others && !self.request.ignore_siblings;
        let admitted = self.admitted.as_mut().ok_or_else(nothing_to_commit)?;
        let CommitRequest { cache, rate_limit, .. } = *self.request;
        devices.set_workers(self.workers.take());
        if self.request.wipe {
            devices.wipe();
        }
        paths.set_cache(devices, cache)?;
        let atomic = self.atomic.take();
        self.way = atomic.as_ref().map(Atomic::way);
        atomic.iter().for_each(|atomic| atomic.attend(devices));
        let observer = session.observer();
        let meter = Meter::attend(devices, paths, session, cache, admitted.overlay_length);
        devices.pace_mut().limit(rate_limit);
        let longest = paths.target().filter_map(|number| devices.device(number)).map(Device::max_length);
        Ok(CommitEvents {
            last_phase: match (self.request.only_plans(), admitted.keep_overlay) {
                (true, _) => Phase::Look,
                (false, _) if admitted.wanted.is_some() => Phase::Children,
                (false, true) => Phase::Target,
                (false, false) => Phase::Overlay,
            },
            keep_overlay: admitted.keep_overlay,
            has_siblings,
            bitmaps: self.request.bitmaps.then(Vec::new),
            names: (self.request.overlay.clone(), self.paths.1.clone()),
            bounds: match self.request.mode {
                CommitMode::Measure => admitted.bounds,
                CommitMode::Whole | CommitMode::DryRun => {
                    PlanBounds { longest: longest.fold(0, u64::saturating_add), ..admitted.bounds }
                }
            },
            meter: Some(meter),
            space: admitted.space,
            repeated: admitted.doubt.as_ref().and_then(|doubt| Repeated::new(&doubt.mark)),
            warnings: self.warnings.clone(),
            observer: Some(observer.clone()),
            verification: (self.request.verify && !self.request.only_plans()).then(|| Verification::new(paths)),
            digests: self.request.digest.then(|| Digests::new(paths, admitted.virtual_size)),
            atomic,
            ..CommitEvents::default()
        })
    }

    fn finish(self, mut ended: Ended<CommitEvents>) -> Result<CommitOutcome, Error> {
        let (mut atomic, only_plans) = (ended.events.atomic.take(), self.request.only_plans());
        let events = &ended.events;
        if events.damages_siblings {
            return Err(match (&self.siblings, self.settled()) {
                (None, Some(sibling)) => is_sibling(sibling, &self.paths.1),
                (siblings, _) => siblings.as_ref().map_or_else(nothing_to_commit, Siblings::refusal),
            });
        }
        let found = |kept: Option<&str>| {
            let verified = events.verification.as_ref().and_then(|found| found.error(&ended.paths, kept));
            verified.or_else(|| events.digests.as_ref()?.error(&ended.paths, kept))
        };
        if let Some(error) = found(None) {
            return Err(match atomic.take() {
                // The target was restored.
                Some(atomic) => {
                    let usual = |state: &str| found(Some(state)).unwrap_or_else(nothing_to_commit);
                    atomic.error(Changed::of(&ended.devices), usual)
                }
                None => error,
            });
        }
        let admitted = self.admitted.ok_or_else(nothing_to_commit)?;
        let end = match events.lacking {
            Some(lacking) => Err(no_space("the commit", lacking)),
            None if events.repeated.as_ref().is_some_and(Repeated::is_refused) => {
                let clause = admitted.doubt.as_ref().map(|doubt| doubt.clause.clone()).unwrap_or_default();
                let refused = GuestFailure::ended(ErrorCode::FormatMismatch, clause);
                Err(GuestFailure { device: Some(DEVICE_OUTPUT), ..refused })
            }
            None => ended.end,
        };
        let report = end.map_err(|failure| {
            let changed = Changed::of(&ended.devices);
            let usual = |state: &str| failure.error(&ended.paths, Some(state));
            match atomic.take() {
                Some(atomic) => atomic.error(changed, usual),
                None => usual(changed.clause()),
            }
        })?;
        // Whatever happens now, the overlay no longer matches the old target's mark, or keeps its content.
        atomic.iter().filter(|_| !only_plans).for_each(Atomic::finished);
        let overlay = ended.devices.device(ended.paths.own()).filter(|_| !self.request.only_plans());
        let deletion = self.deletion.and_then(Result::ok);
        if let (Some(deletion), Some(overlay)) = (&deletion, overlay) {
            deletion.remove(overlay.file())?;
        }
        events.meter.iter().for_each(Meter::done);
        let preview = events.plan.as_ref().filter(|_| self.request.only_plans()).map(|plan| {
            let log = (self.way == Some(AtomicWay::UndoLog)).then(|| log_room(plan, &admitted));
            Preview {
                free_bytes: admitted.free,
                undo_log_bytes: log,
                undo_free_bytes: log.and(self.undo_free),
                ..Preview::of(plan, admitted.length, admitted.taken, &admitted.units())
            }
            .with_lack()
        });
        Ok(CommitOutcome {
            overlay: self.paths.0,
            overlay_given: self.request.overlay.clone(),
            overlay_format: admitted.formats.0,
            backing: self.paths.1,
            backing_format: admitted.formats.1,
            clusters_committed: events.outcome.clusters_committed,
            bytes_committed: events.outcome.bytes_committed,
            overlay_clusters_cleared: events.outcome.overlay_clusters_cleared,
            overlay_bytes_wiped: (self.request.wipe && !self.request.only_plans())
                .then_some(ended.devices.stats().overwritten),
            verified_bytes: self.request.verify.then(|| events.verification.as_ref().map_or(0, Verification::bytes)),
            digest: events.digests.as_ref().and_then(Digests::found),
            overlay_deleted: deletion.map(|_| overlay.is_some()),
            atomic: self.way,
            backup: self.backup.filter(|_| !only_plans),
            stale: admitted.stale,
            relinked: self.request.relinks().then_some(self.relinked),
            bitmaps: events.bitmaps.clone(),
            warnings: events.warnings.clone(),
            preview,
            backing_grows_to: admitted.backing_grows_to,
            sandbox: ended.sandbox,
            run: GuestRun { report, statistics: ended.devices.stats().clone() },
            timing: ended.timing,
        })
    }
}
