//! The adoption as an [`Operation`]: which images it opens, who is asked before it begins, and what comes of it. The guest's half
//! is that of a rebase, onto what the target is backed by.

use super::admit::admit;
use super::take_over::TakeOver;
use super::{out_of_order, AdoptOutcome, AdoptRequest};
use crate::commit::{become_stale, no_space, refuse_children, Meter, Siblings, Space};
use crate::confine::{Reach, Work};
use crate::devices::{Devices, Workers};
use crate::error::Error;
use crate::image::{
    check_parents, open_extra_files, resolve_backing, Access, BackingChoice, ChainImage, Descent, FilesOf, NamedFile,
    Target,
};
use crate::lookup::Directory;
use crate::operation::{
    ask, ask_below, DevicePaths, Ended, Grants, ImageSet, Named, Opener, Operation, Session, Settings, Slot,
};
use crate::plugins::Registry;
use crate::rebase::{self, RebaseEvents};
use crate::sandbox::ModuleSpec;
use instar_guest_abi::{ErrorCode, MemberRole, DEVICE_OUTPUT, MAX_CHAIN_DEVICES, PARENT_ROOM};
use instar_guest_protocol::rebase::{Config, Parent};
use instar_guest_protocol::Message;
use instar_plugin_api::{Context, Role};
use std::path::PathBuf;

/// The group of the images that stay below the overlay.
const NEW: u32 = 1;

/// What the overlay is, if it no longer leads to the target.
const INTERRUPTED: &str =
    "if an earlier run with --by-adoption was interrupted, the overlay holds everything by now, and only has \
                           to be given the name of the target with `mv`";

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
    /// What is known of the space that its file system has.
    space: Option<Space>,
    /// The target's device.
    target: u32,
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
}

/// Whether the chain of an overlay can be followed to its end, and the target is not in it. What could not be looked at may be the
/// target: nobody is told then that the overlay does not need it.
fn lacks_base(opener: &Opener<'_, '_>, overlay: &ChainImage<'_>) -> bool {
    let base = opener.named.base.as_ref().and_then(NamedFile::identity);
    let mut descent = Descent::new(opener.registry, opener.below, opener.named.image.path(), MAX_CHAIN_DEVICES);
    let chain = descent.open_below(overlay, Access::ReadOnly);
    chain.is_ok_and(|chain| base.is_some() && chain.iter().all(|layer| Some(layer.opened.identity) != base))
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
            ErrorCode::ImageNotFound => error.in_state(ENDED),
            _ => error,
        })?;
        let mut overlay = opened.lock(access)?.identify_overlay(registry, self.request.format.as_deref())?;
        session.note_image("overlay", &overlay);
        let mut descent = Descent::new(registry, below, named.image.path(), MAX_CHAIN_DEVICES);
        let format = self.request.base_format.as_deref();
        let choice = BackingChoice { base: named.base.as_ref(), format, access };
        let Target { mut backing, mut between, .. } =
            resolve_backing(&mut descent, &overlay, choice).map_err(|error| match error.code {
                ErrorCode::NoBacking | ErrorCode::NotInChain if lacks_base(opener, &overlay) => {
                    error.in_state(INTERRUPTED)
                }
                _ => error,
            })?;
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
        let remedy = "have them name the target with --relink, and commit without --by-adoption";
        refuse_children(opener, &chain, &[], remedy)?;
        let above: Vec<&ChainImage<'_>> = std::iter::once(&overlay).chain(&between).collect();
        let siblings = Siblings::find(opener, &above, &backing, &ancestors)?;
        self.opened = Some(Opened {
            names: TakeOver::begin(&overlay.opened, &backing.opened)?,
            paths: (overlay.opened.settled_path(), backing.opened.settled_path()),
            format: overlay.facts.format.to_string(),
            virtual_size: overlay.facts.virtual_size,
            length: overlay.length(),
            space: Space::of(&overlay, &between.iter().chain([&backing]).collect::<Vec<_>>()),
            target: u32::try_from(between.len()).map_err(|_| out_of_order())?,
            parent: parent_of(&backing, &ancestors)?,
            stale: between.iter().map(|layer| layer.opened.path.clone()).collect(),
            siblings,
        });
        if self.request.dry_run {
            [&overlay, &backing].into_iter().try_for_each(|image| image.opened.check_writable())?;
        }
        let first = between.len() + 1;
        let old: Vec<ChainImage<'r>> = between.into_iter().chain([backing]).chain(ancestors).collect();
        let again = (first..old.len()).map(|slot| (NEW, slot)).collect();
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
        Config { dry_run: self.request.dry_run, unsafe_mode: false, parent }.encode_to_vec()
    }

    fn serve(&mut self, devices: &mut Devices, paths: &DevicePaths, session: &Session) -> Result<RebaseEvents, Error> {
        let opened = self.opened.as_ref().ok_or_else(out_of_order)?;
        let AdoptRequest { cache, dry_run, .. } = *self.request;
        devices.set_workers(self.workers.take());
        let events = RebaseEvents {
            warnings: self.warnings.clone(),
            dry_run,
            virtual_size: opened.virtual_size,
            space: opened.space,
            likeness: Some(opened.target),
            ..RebaseEvents::default()
        };
        events.serve(devices, paths, session, (cache, opened.length))
    }

    fn finish(self, ended: Ended<RebaseEvents>) -> Result<AdoptOutcome, Error> {
        let Opened { names, paths, format, stale, .. } = self.opened.ok_or_else(out_of_order)?;
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
        let end = ended.events.lacking.map_or(ended.end, |lacking| Err(no_space("the overlay", lacking)));
        end.map_err(|failure| failure.error(&ended.paths, Some(state)))?;
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
