//! The commit as an [`Operation`]: it opens the images, asks the plugins before it begins, and reports the result.

use super::admitted::Admitted;
use super::atomic::{Atomic, AtomicWay};
use super::delete::Deletion;
use super::digest::Digests;
use super::events::CommitEvents;
use super::outcome::CommitOutcome;
use super::plan::PlanBounds;
use super::refusals::{not_writable, nothing_to_commit};
use super::relinks::{Relinked, Relinks};
use super::repeated::Repeated;
use super::request::{CommitMode, CommitRequest};
use super::verify::Verification;
use crate::confine::{Reach, Work};
use crate::devices::{Device, Devices, Workers};
use crate::error::{Error, Role};
use crate::escape::{escape_bytes, escape_path};
use crate::image::{
    open_extra_files, parent_is_unrecorded, resolve_backing, undo_directory, Access, BackingChoice, ChainImage,
    Descent, FilesOf, Gate, NamedFile, Target,
};
use crate::lookup::Directory;
use crate::operation::{
    free_in, DevicePaths, Ended, Grants, ImageSet, Meter, Named, NamedDirectory, Opener, Operation, Room, Session,
    Settings, Slot,
};
use crate::others::{refuse_children, Siblings};
use crate::plugins::Registry;
use crate::sandbox::ModuleSpec;
use instar_guest_abi::{ErrorCode, MemberRole, Phase, MAX_CHAIN_DEVICES};
use instar_guest_protocol::commit::Config;
use instar_guest_protocol::Message;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// The bound on the messages of a commit that reads nothing back, in bytes.
const MESSAGES: u64 = 16 << 20;

/// A commit in progress.
pub struct Commit<'q> {
    pub(super) request: &'q CommitRequest,
    /// Threads that copy in parallel, if there is much to copy and the system permits them.
    workers: Option<Workers>,
    /// The lines of a dry run about files that a commit could not write.
    pub(super) warnings: Vec<String>,
    /// Other images that the commit would damage.
    pub(super) siblings: Option<Siblings>,
    /// Absolute paths of the overlay and the backing.
    pub(super) paths: (PathBuf, PathBuf),
    /// The overlay's children that the commit relinks to the backing, or that name it already.
    pub(super) relinked: Vec<Relinked>,
    /// The overlay's name, if it will be removed.
    pub(super) deletion: Option<Result<Deletion, Error>>,
    /// The bound on the messages of reading back, in bytes.
    pub(super) message_limit: u64,
    pub(super) admitted: Option<Admitted>,
    /// The state of `--atomic`, with which the target changes completely or not at all.
    pub(super) atomic: Option<Atomic>,
    /// The way in which the old target is kept.
    pub(super) way: Option<AtomicWay>,
    /// Free bytes in the directory of its undo log, if that is another one.
    pub(super) undo_free: Option<u64>,
    /// The old target's name afterwards.
    pub(super) backup: Option<PathBuf>,
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
    pub(super) fn settled(&self) -> Option<&Path> {
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

    fn inside_a_machine(&self) -> Option<&'static str> {
        Some("commit inside it with block-commit")
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
        let mut descent = Descent::new(registry, below, named.image.path(), MAX_CHAIN_DEVICES, session.cancel());
        let format = self.request.base_format.as_deref();
        let choice = BackingChoice { base: named.base.as_ref(), format, access };
        let Target { mut backing, mut between, stands_in } = resolve_backing(&mut descent, &overlay, choice)?;
        if stands_in {
            // A relative -b begins at the overlay's directory, and other layers may lie in others.
            let given = self.request.base.clone().filter(|_| between.is_empty());
            let given = given.unwrap_or_else(|| backing.opened.settled_path());
            self.warnings.push(between.last().unwrap_or(&overlay).does_not_lead_to(&backing, &given));
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
            refuse_children(opener, &chain, &children, remedy)?;
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
        self.ask_all(images, session)
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
                (true, _) => Phase::Inspect,
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
            // A measurement tells how much is lacking; only a commit is refused for that.
            room: Room::of(admitted.space.filter(|_| self.request.mode != CommitMode::Measure)),
            repeated: admitted.doubt.as_ref().and_then(|doubt| Repeated::new(&doubt.mark)),
            warnings: self.warnings.clone(),
            observer: Some(observer.clone()),
            verification: (self.request.verify && !self.request.only_plans()).then(|| Verification::new(paths)),
            digests: self.request.digest.then(|| Digests::new(paths, admitted.virtual_size)),
            atomic,
            ..CommitEvents::default()
        })
    }

    fn finish(self, ended: Ended<CommitEvents>) -> Result<CommitOutcome, Error> {
        self.end(ended)
    }
}
