//! The adoption as an [`Operation`]: which images it opens, who is asked before it begins, and what comes of it. The guest's half
//! is that of a rebase, onto what the target is backed by.

use super::admit::admit;
use super::mark::{self, Stale};
use super::resume::resume;
use super::take_over::TakeOver;
use super::{out_of_order, AdoptOutcome, AdoptRequest};
use crate::commit::become_stale;
use crate::confine::{Reach, Work};
use crate::devices::{Devices, Workers};
use crate::error::Error;
use crate::image::{
    check_parents, open_extra_files, resolve_backing, Access, BackingChoice, ChainImage, Descent, FilesOf, NamedFile,
    OpenedFile, Target,
};
use crate::lookup::Directory;
use crate::operation::{
    ask, ask_below, DevicePaths, Ended, Grants, ImageSet, Meter, Named, Opener, Operation, Room, Session, Settings,
    Slot, Space,
};
use crate::others::{refuse_children, Siblings};
use crate::plugins::Registry;
use crate::rebase::{self, Likeness, RebaseEvents};
use crate::sandbox::ModuleSpec;
use instar_guest_abi::{ErrorCode, MemberRole, DEVICE_OUTPUT, MAX_CHAIN_DEVICES, PARENT_ROOM};
use instar_guest_protocol::rebase::{Config, Parent};
use instar_guest_protocol::Message;
use instar_plugin_api::{Context, Role};
use std::path::PathBuf;

/// What is to be done about images on the overlay.
const CHILDREN: &str = "have them name the target with --relink, and commit without --by-adoption";

/// The same in a second run. The overlay no longer leads to the target, so that no commit relinks to that.
const CHILDREN_AFTERWARDS: &str =
    "an earlier run was interrupted before the last step, and the overlay no longer needs the target: leave it under its name, or \
     have them name the target with `instar rebase -u`, and add --ignore-siblings";

/// Where the overlay is, if there is none.
const ENDED: &str = "if an earlier run with --by-adoption has ended, it is what the target is now";

/// An adoption on its way.
pub struct Adopt<'q> {
    request: &'q AdoptRequest,
    /// Threads that copy side by side, if the system has them.
    workers: Option<Workers>,
    warnings: Vec<String>,
    /// The directory of the overlay, in which its name changes.
    directory: Option<Directory>,
    opened: Option<Opened>,
}

/// What is known of the images once they are open.
struct Opened {
    names: TakeOver,
    /// Absolute paths of the overlay and the target.
    paths: (PathBuf, PathBuf),
    format: String,
    virtual_size: u64,
    /// Bytes of the overlay's file.
    length: u64,
    /// The facts about its file system's space.
    space: Option<Space>,
    /// The target, which the overlay has to look like, and what it says meanwhile. `None` in a second run that has only the name left
    /// to change.
    likeness: Option<Likeness>,
    /// The target of such a run, which no device needs, locked to the end.
    locked: Option<OpenedFile>,
    /// What the overlay is to record.
    parent: Option<Parent>,
    /// The layers between the two.
    stale: Vec<PathBuf>,
    siblings: Option<Siblings>,
}

impl<'q> Adopt<'q> {
    /// An adoption that was not begun.
    pub fn new(request: &'q AdoptRequest) -> Self {
        Self { request, workers: None, warnings: Vec::new(), directory: None, opened: None }
    }

    /// Whether the guest changes nothing: the overlay of a second run holds everything by now.
    fn only_looks(&self) -> bool {
        self.request.dry_run || self.opened.as_ref().is_some_and(|opened| opened.locked.is_some())
    }

    /// There is no overlay: a first run that was killed after the last step may have left its mark on the target.
    fn remove_mark(&self, named: &Named) {
        let Some(base) = named.base.as_ref().filter(|_| !self.request.dry_run) else { return };
        let opened = base.open(Access::ReadWrite, ErrorCode::BackingNotFound);
        if let Ok(base) = opened.and_then(|base| base.lock(Access::ReadWrite)) {
            mark::remove_if_done(base.file.file(), &base.holder);
        }
    }

    /// Open what a second run looks at, which only gives the overlay the name of `target`: what is below the overlay now is below it
    /// afterwards.
    fn open_resumed<'r>(
        &mut self,
        opener: &Opener<'r, '_>,
        mut overlay: ChainImage<'r>,
        mut target: ChainImage<'r>,
        stale: &Stale,
    ) -> Result<ImageSet<'r>, Error> {
        let Opener { registry, session, named, gate, below, access, .. } = *opener;
        session.note(|| "an earlier run was interrupted before the last step, which is all that is left".to_owned());
        session.note_image("backing", &target);
        let mut descent = Descent::new(registry, below, named.image.path(), MAX_CHAIN_DEVICES, session.cancel());
        let mut ancestors = descent.open_below(&overlay, Access::ReadOnly)?;
        let mut files = vec![FilesOf { image: &mut overlay, access, changes: true, gate }];
        let only_read = std::iter::once(&mut target).chain(&mut ancestors);
        files.extend(only_read.map(|image| FilesOf { image, access: Access::ReadOnly, changes: false, gate: below }));
        open_extra_files(registry, &mut files)?;
        admit(self.request, &overlay, &target)?;
        let chain: Vec<&ChainImage<'_>> = std::iter::once(&overlay).chain(&ancestors).collect();
        check_parents(&chain)?;
        refuse_children(opener, &chain, &[], CHILDREN_AFTERWARDS)?;
        let siblings = Siblings::find(opener, &[&overlay], &target, &ancestors, |file| stale.contains(file))?;
        if self.request.dry_run {
            [&overlay, &target].into_iter().try_for_each(|image| image.opened.check_writable())?;
        }
        self.opened = Some(Opened {
            names: TakeOver::begin(&overlay.opened, &target.opened)?,
            paths: (overlay.opened.settled_path(), target.opened.settled_path()),
            format: overlay.facts.format.to_string(),
            virtual_size: overlay.facts.virtual_size,
            length: overlay.length(),
            space: None,
            likeness: None,
            parent: parent_of(&overlay, &ancestors)?,
            stale: Vec::new(),
            siblings,
            locked: Some(target.opened),
        });
        let again = (0..ancestors.len()).map(|slot| (rebase::NEW, slot)).collect();
        let slots = ancestors.into_iter().map(|image| Slot::new(MemberRole::Below, image)).collect();
        Ok(ImageSet { slots, target: Some(overlay), rebases: true, again })
    }
}

/// The target, which the overlay has to look like, and what it says of itself on the way there.
fn likeness(target: &ChainImage<'_>, between: &[ChainImage<'_>]) -> Result<Likeness, Error> {
    let device = u32::try_from(between.len()).map_err(|_| out_of_order())?;
    let text = mark::text(target.opened.file.file(), between.iter().map(|layer| layer.opened.file.file()));
    let text = text.map_err(|errno| {
        let what = "cannot be looked at";
        Error::io(&target.opened.path, ErrorCode::OpenFailed, what, &std::io::Error::from(errno))
    })?;
    Ok(Likeness { device, mark: (mark::NAME, text) })
}

/// What an image in the target's place records of what is below that.
fn parent_of(target: &ChainImage<'_>, ancestors: &[ChainImage<'_>]) -> Result<Option<Parent>, Error> {
    let Some(pointer) = target.facts.backing.as_ref().into_option() else { return Ok(None) };
    let below = &ancestors.first().ok_or_else(out_of_order)?.facts;
    Ok(Some(Parent {
        name: pointer.name.to_vec(),
        format: below.format.to_string(),
        identity: below.identity.to_vec(),
        virtual_size: below.virtual_size,
    }))
}

impl Operation for Adopt<'_> {
    type Events = RebaseEvents;
    type Outcome = AdoptOutcome;

    fn module(&self) -> ModuleSpec<'static> {
        rebase::MODULE
    }

    fn work(&self) -> (Work, Work) {
        (Work::OpenToAdopt, Work::Adopt)
    }

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        let named = Named::image(&self.request.overlay);
        let base = NamedFile::beside(&named.image, &self.request.base);
        Named { base: Some(base), ..named }
    }

    fn access(&self) -> Access {
        if self.request.dry_run {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        }
    }

    fn acquire(&mut self, named: &Named, _: &Registry) {
        self.directory = named.image.real_directory();
        // Without them, one thread does it all.
        self.workers = if self.request.dry_run { None } else { Workers::start().ok() };
    }

    fn reach_of_names<'n>(&'n self, _: &'n [Directory], reach: Reach<'n>) -> Reach<'n> {
        let directory = match &self.opened {
            _ if self.request.dry_run => None,
            Some(opened) => Some(opened.names.directory()),
            None => self.directory.as_ref(),
        };
        directory.into_iter().fold(reach, Reach::add_names)
    }

    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
        let Opener { registry, session, named, gate, below, access, .. } = *opener;
        let opened = named.image.open(access, ErrorCode::ImageNotFound).map_err(|error| match error.code {
            ErrorCode::ImageNotFound => {
                self.remove_mark(named);
                error.in_state(ENDED)
            }
            _ => error,
        })?;
        let mut overlay = opened.lock(access)?.identify_overlay(registry, self.request.format.as_deref())?;
        session.note_image("overlay", &overlay);
        let mut descent = Descent::new(registry, below, named.image.path(), MAX_CHAIN_DEVICES, session.cancel());
        let format = self.request.base_format.as_deref();
        let choice = BackingChoice { base: named.base.as_ref(), format, access };
        let Target { mut backing, mut between, .. } = match resolve_backing(&mut descent, &overlay, choice) {
            Err(error) if matches!(error.code, ErrorCode::NoBacking | ErrorCode::NotInChain) => {
                let (target, stale) = resume(self.request, opener, &overlay, error)?;
                return self.open_resumed(opener, overlay, target, &stale);
            }
            found => found?,
        };
        between.iter().for_each(|layer| session.note_image("merged, too", layer));
        session.note_image("backing", &backing);
        let mut ancestors = descent.open_below(&backing, Access::ReadOnly)?;
        let mut files = vec![FilesOf { image: &mut overlay, access, changes: true, gate }];
        let only_read = between.iter_mut().chain([&mut backing]).chain(&mut ancestors);
        let read = |image| FilesOf { image, access: Access::ReadOnly, changes: false, gate: below };
        files.extend(only_read.map(read));
        open_extra_files(registry, &mut files)?;
        ancestors.iter().for_each(|layer| session.note_image("below it", layer));
        admit(self.request, &overlay, &backing)?;
        let chain: Vec<&ChainImage<'_>> =
            std::iter::once(&overlay).chain(&between).chain([&backing]).chain(&ancestors).collect();
        check_parents(&chain)?;
        refuse_children(opener, &chain, &[], CHILDREN)?;
        let above: Vec<&ChainImage<'_>> = std::iter::once(&overlay).chain(&between).collect();
        let siblings = Siblings::find(opener, &above, &backing, &ancestors, |_| false)?;
        self.opened = Some(Opened {
            names: TakeOver::begin(&overlay.opened, &backing.opened)?,
            paths: (overlay.opened.settled_path(), backing.opened.settled_path()),
            format: overlay.facts.format.to_string(),
            virtual_size: overlay.facts.virtual_size,
            length: overlay.length(),
            space: Space::of(&overlay, &between.iter().chain([&backing]).collect::<Vec<_>>()),
            likeness: Some(likeness(&backing, &between)?),
            locked: None,
            parent: parent_of(&backing, &ancestors)?,
            stale: between.iter().map(|layer| layer.opened.path.clone()).collect(),
            siblings,
        });
        if self.request.dry_run {
            [&overlay, &backing].into_iter().try_for_each(|image| image.opened.check_writable())?;
        }
        let first = between.len() + 1;
        let old: Vec<ChainImage<'r>> = between.into_iter().chain([backing]).chain(ancestors).collect();
        let again = (first..old.len()).map(|slot| (rebase::NEW, slot)).collect();
        let slots = old.into_iter().map(|image| Slot::new(MemberRole::Below, image)).collect();
        Ok(ImageSet { slots, target: Some(overlay), rebases: true, again })
    }

    fn admit(&mut self, images: &mut ImageSet<'_>, session: &Session) -> Result<Grants, Error> {
        let overlay = images.target.as_ref().ok_or_else(out_of_order)?;
        let opened = self.opened.as_ref().ok_or_else(out_of_order)?;
        let chain: Vec<&ChainImage<'_>> = images.slots.iter().map(|slot| &slot.image).collect();
        ask_below(&chain, &mut self.warnings)?;
        let context = Context::reading(chain.first().map(|parent| &parent.facts), false);
        let longest = ask(overlay, Role::Write, "be written", &context, &mut self.warnings)?;
        match (&opened.siblings, self.request.ignore_siblings) {
            (Some(siblings), false) => return Err(siblings.refusal()),
            (Some(siblings), true) => self.warnings.push(siblings.warning(self.request.dry_run)),
            (None, _) => {}
        }
        self.warnings.extend(become_stale(&opened.stale, self.request.dry_run));
        session.note(|| format!("{} layers below it now, {} afterwards", chain.len(), images.again.len()));
        let target = longest.max(overlay.facts.file_length).saturating_add(PARENT_ROOM);
        Ok(Grants { target, ..Grants::default() })
    }

    fn payload(&self) -> Vec<u8> {
        let parent = self.opened.as_ref().and_then(|opened| opened.parent.clone());
        Config { dry_run: self.only_looks(), unsafe_mode: false, parent }.encode_to_vec()
    }

    fn serve(&mut self, devices: &mut Devices, paths: &DevicePaths, session: &Session) -> Result<RebaseEvents, Error> {
        let opened = self.opened.as_ref().ok_or_else(out_of_order)?;
        let AdoptRequest { cache, .. } = *self.request;
        devices.set_workers(self.workers.take());
        let events = RebaseEvents {
            warnings: self.warnings.clone(),
            dry_run: self.only_looks(),
            virtual_size: opened.virtual_size,
            room: Room::of(opened.space),
            likeness: opened.likeness.clone(),
            ..RebaseEvents::default()
        };
        events.serve(devices, paths, session, (cache, opened.length))
    }

    fn finish(self, ended: Ended<RebaseEvents>) -> Result<AdoptOutcome, Error> {
        let Opened { names, paths, format, stale, locked, .. } = self.opened.ok_or_else(out_of_order)?;
        let state = if ended.devices.any_changed() {
            "the overlay reads what it read, and the target is as it was; running the same command again finishes it, or says what \
             is left to do"
        } else {
            "nothing was changed"
        };
        if let Some(why) = ended.events.unlike {
            let clause = format!("cannot be replaced by the overlay: {why}");
            return Err(Error::image(&paths.1, ErrorCode::BackingIo, clause).in_state(state));
        }
        let end = ended.events.room.judge("the overlay", ended.end);
        end.map_err(|failure| failure.error(&ended.paths, Some(state)))?;
        if locked.is_some() && ended.events.outcome.clusters_written > 0 {
            return Err(out_of_order());
        }
        if !self.request.dry_run {
            names.complete(ended.devices.device(DEVICE_OUTPUT).ok_or_else(out_of_order)?.file())?;
        }
        let events = ended.events;
        events.meter.iter().for_each(Meter::done);
        Ok(AdoptOutcome {
            overlay: paths.0,
            overlay_given: self.request.overlay.clone(),
            overlay_format: format.clone(),
            backing: paths.1,
            backing_format: format,
            adopted: !self.request.dry_run,
            clusters_kept: events.outcome.clusters_written,
            bytes_kept: events.outcome.bytes_written,
            dry_run: self.request.dry_run,
            stale,
            warnings: events.warnings,
            sandbox: ended.sandbox,
        })
    }
}
