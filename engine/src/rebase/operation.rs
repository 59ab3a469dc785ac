//! The rebase as an [`Operation`]: it opens the images, asks the plugins before it begins, and reports the result.

use super::events::RebaseEvents;
use super::open::{named_parent, open_unchecked, refuse_unrecorded, Below};
use super::{out_of_order, RebaseOutcome, RebaseRequest};
use crate::bytes::Bytes;
use crate::confine::Work;
use crate::devices::{Devices, Workers};
use crate::error::Error;
use crate::escape::{escape, escape_path};
use crate::image::{file_name, open_extra_files, Access, ChainImage, FilesOf};
use crate::operation::{
    ask, ask_below, DevicePaths, Ended, Grants, ImageSet, Meter, Named, Opener, Operation, Room, Session, Settings,
    Slot, Space,
};
use crate::plugins::Registry;
use crate::sandbox::ModuleSpec;
use instar_guest_abi::{ErrorCode, MemberRole, DEVICE_OUTPUT, PARENT_ROOM};
use instar_guest_protocol::rebase::{Config, Parent};
use instar_guest_protocol::Message;
use instar_plugin_api::{Context, ImageFacts, Role};
use std::path::PathBuf;

/// The group of the images that will be below the image.
pub(crate) const NEW: u32 = 1;

/// A rebase in progress.
pub struct Rebase<'q> {
    request: &'q RebaseRequest,
    /// Threads that copy in parallel, if the system permits them.
    workers: Option<Workers>,
    warnings: Vec<String>,
    /// Whether nothing can be written into the image: see [`RebaseEvents::only_record`].
    only_record: bool,
    /// The record that the image gets, once it is known.
    parent: Option<Parent>,
    /// The facts of the new parent.
    parent_facts: Option<ImageFacts>,
    opened: Option<Opened>,
}

/// The facts of the image once it is open.
struct Opened {
    path: PathBuf,
    format: String,
    virtual_size: u64,
    /// Bytes of its files.
    length: u64,
    /// What is known of the space that its file system has.
    space: Option<Space>,
}

impl<'q> Rebase<'q> {
    /// Make a rebase that has not begun.
    pub fn new(request: &'q RebaseRequest) -> Self {
        let (workers, only_record, parent, parent_facts, opened) = (None, false, None, None, None);
        Self { request, workers, warnings: Vec::new(), only_record, parent, parent_facts, opened }
    }

    /// Make the image record this parent.
    fn record(&mut self, new: Option<&ChainImage<'_>>) {
        let Some((name, format)) = &self.request.backing else { return };
        let facts = new.map(|new| &new.facts);
        self.parent = Some(Parent {
            name: name.as_bytes().to_vec(),
            format: facts.map_or_else(|| format.clone(), |facts| facts.format.to_string()),
            identity: facts.map(|facts| facts.identity.to_vec()).unwrap_or_default(),
            virtual_size: facts.map_or(0, |facts| facts.virtual_size),
        });
        self.parent_facts = facts.cloned();
    }

    /// The warnings of a rebase that compares nothing, before it begins.
    fn say_unsafe(&mut self, image: &ChainImage<'_>, new: Option<&ChainImage<'_>>) -> Result<(), Error> {
        let path = escape_path(&image.opened.path);
        match (&self.request.backing, new) {
            (None, _) => self.warnings.push(format!("'{path}': what it holds nothing of reads as zeroes from now on")),
            (Some((name, _)), None) if !image.facts.parent_identity.is_empty() => {
                let clause = format!(
                    "records the identity of its parent, which only the parent can tell, and '{}' cannot be read: put it there \
                     first",
                    escape(name)
                );
                return Err(Error::image(&image.opened.path, ErrorCode::BackingNotFound, clause));
            }
            // A network address, or a file whose name looks like one.
            (Some((name, _)), None) if file_name(name.as_bytes()).is_err() => {
                let clause = if file_beside(image, name) {
                    format!("leads to no file: to name the file that is there, write './{}'", escape(name))
                } else {
                    "is no file, and could not be looked at".to_owned()
                };
                self.warnings.push(format!("'{path}': nothing was compared, and '{}' {clause}", escape(name)));
            }
            (Some((name, _)), None) => self.warnings.push(format!(
                "'{path}': nothing was compared, and '{}' could not be looked at: until it is there, the image cannot be read",
                escape(name)
            )),
            (Some((name, _)), Some(_)) => self.warnings.push(format!(
                "'{path}': nothing was compared: where it holds nothing, it reads what '{}' holds from now on",
                escape(name)
            )),
        }
        if !image.facts.snapshots.is_empty() {
            self.warnings.push(format!("'{path}': so do its internal snapshots"));
        }
        Ok(())
    }
}

/// Whether a file of this name lies beside an image, although the name as given leads to none.
fn file_beside(image: &ChainImage<'_>, name: &str) -> bool {
    let plain = !name.contains('/');
    plain && image.opened.directory.look(std::ffi::OsStr::new(name)).is_ok()
}

/// The refusal of internal snapshots: they read through the same backing file, and nothing can be written into them.
fn refuse_snapshots(image: &ChainImage<'_>) -> Result<(), Error> {
    let count = image.facts.snapshots.len();
    if count == 0 {
        return Ok(());
    }
    let clause = format!(
        "has internal snapshots ({count}), which read the backing file wherever they hold nothing, and would read something else \
         over another one: delete them first, or, if the new backing file is known to hold the same, use -u"
    );
    Err(Error::image(&image.opened.path, ErrorCode::UnsupportedFormat, clause))
}

impl Operation for Rebase<'_> {
    type Events = RebaseEvents;
    type Outcome = RebaseOutcome;

    fn module(&self) -> ModuleSpec<'static> {
        super::MODULE
    }

    fn work(&self) -> (Work, Work) {
        (Work::OpenToCommit, Work::Commit)
    }

    fn reads_below(&self) -> bool {
        true
    }

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        let named = Named::image(&self.request.image);
        let base = self.request.backing.as_ref().and_then(|(name, _)| named_parent(&named.image, name));
        Named { base, ..named }
    }

    fn access(&self) -> Access {
        if self.request.dry_run {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        }
    }

    fn acquire(&mut self, _: &Named, _: &Registry) {
        // Without them, one thread does it all.
        let copies = !self.request.dry_run && !self.request.unsafe_mode;
        self.workers = if copies { Workers::start().ok() } else { None };
    }

    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
        let Opener { registry, session, named, gate, access, .. } = *opener;
        let opened = named.image.open(access, ErrorCode::ImageNotFound)?.lock(access)?;
        let mut image = opened.identify_overlay(registry, self.request.format.as_deref())?;
        session.note_image("image", &image);
        refuse_unrecorded(&image)?;
        if self.request.dry_run {
            image.opened.check_writable()?;
        }
        let format = self.request.backing.as_ref().map(|(_, format)| format.as_str());
        let mut below = Below::default();
        if self.request.unsafe_mode {
            let new = format.map(|format| open_unchecked(opener, &image, format)).transpose()?.flatten();
            self.record(new.as_ref());
            self.say_unsafe(&image, new.as_ref())?;
        } else {
            refuse_snapshots(&image)?;
            below = Below::open(opener, &image, format)?;
            let first = below.after().next();
            self.record(first);
        }
        let mut files = vec![FilesOf { image: &mut image, access, changes: true, gate }];
        let only_read = below.old.iter_mut().chain(&mut below.new);
        let read = |image| FilesOf { image, access: Access::ReadOnly, changes: false, gate: opener.below };
        files.extend(only_read.map(read));
        open_extra_files(registry, &mut files)?;
        below.old.iter().for_each(|layer| session.note_image("below it now", layer));
        below.after().for_each(|layer| session.note_image("below it afterwards", layer));
        self.opened = Some(Opened {
            path: image.opened.settled_path(),
            format: image.facts.format.to_string(),
            virtual_size: image.facts.virtual_size,
            length: image.length(),
            space: Space::of(&image, &below.old.iter().collect::<Vec<_>>()),
        });
        let again = below.shared.map(|from| (from..below.old.len()).map(|slot| (NEW, slot)).collect());
        let slot = |group| move |image| Slot { role: MemberRole::Below, group, image };
        let slots = below.old.into_iter().map(slot(0)).chain(below.new.into_iter().map(slot(NEW)));
        let slots = slots.collect();
        Ok(ImageSet { slots, target: Some(image), rebases: true, again: again.unwrap_or_default() })
    }

    fn admit(&mut self, images: &mut ImageSet<'_>, session: &Session) -> Result<Grants, Error> {
        let image = images.target.as_ref().ok_or_else(out_of_order)?;
        let of_group =
            |group| images.slots.iter().filter(move |slot| slot.group == group).map(|slot| &slot.image).collect();
        let old: Vec<&ChainImage<'_>> = of_group(0);
        let mut new: Vec<&ChainImage<'_>> = of_group(NEW);
        new.extend(images.again.iter().filter_map(|(_, slot)| images.slots.get(*slot)).map(|slot| &slot.image));
        for chain in [&old, &new] {
            ask_below(chain, &mut self.warnings)?;
        }
        if let Some(facts) = &self.parent_facts {
            ask(image, Role::Read, "be read", &Context::reading(Some(facts), false), &mut self.warnings)?;
        }
        let mut longest = image.facts.file_length;
        if !self.request.unsafe_mode {
            let parent = old.first().map(|parent| &parent.facts);
            let context = Context::reading(parent, false);
            longest = longest.max(ask(image, Role::Write, "be written", &context, &mut self.warnings)?);
            // The image records the identity that its parent is about to get; written data would adopt that identity.
            self.only_record = image.facts.parent_announced;
        }
        let shared = images.again.len();
        session
            .note(|| format!("{} layers below it now, {} afterwards, {shared} of them the same", old.len(), new.len()));
        Ok(Grants { target: longest.saturating_add(PARENT_ROOM), ..Grants::default() })
    }

    fn payload(&self) -> Vec<u8> {
        let RebaseRequest { dry_run, unsafe_mode, .. } = *self.request;
        Config { dry_run, unsafe_mode, parent: self.parent.clone() }.encode_to_vec()
    }

    fn serve(&mut self, devices: &mut Devices, paths: &DevicePaths, session: &Session) -> Result<RebaseEvents, Error> {
        let opened = self.opened.as_ref().ok_or_else(out_of_order)?;
        let RebaseRequest { cache, dry_run, .. } = *self.request;
        devices.set_workers(self.workers.take());
        let events = RebaseEvents {
            warnings: self.warnings.clone(),
            only_record: self.only_record,
            fixed: paths.is_block_device(DEVICE_OUTPUT).then_some(opened.length),
            dry_run,
            virtual_size: opened.virtual_size,
            room: Room::of(opened.space),
            ..RebaseEvents::default()
        };
        events.serve(devices, paths, session, (cache, opened.length))
    }

    fn finish(self, ended: Ended<RebaseEvents>) -> Result<RebaseOutcome, Error> {
        let Opened { path, format, length, .. } = self.opened.ok_or_else(out_of_order)?;
        if let (true, Some(plan)) = (ended.events.needs_data, ended.events.plan) {
            let clause = format!(
                "differs over the two backing files in {}, and a commit from it was interrupted; nothing was changed: run the \
                 commit again first",
                Bytes(plan.bytes)
            );
            return Err(Error::image(&self.request.image, ErrorCode::UnsupportedFormat, clause));
        }
        if ended.events.lacks_room {
            let clause = format!(
                "is on a device of {}, which has no room for what differs over the two backing files and for the new \
                 name; nothing was changed: enlarge the device",
                Bytes(length)
            );
            return Err(Error::image(&self.request.image, ErrorCode::NoSpace, clause));
        }
        if ended.events.held_back {
            let clause = "was not rebased: the caller did not agree to the plan; nothing was changed";
            return Err(Error::image(&self.request.image, ErrorCode::Interrupted, clause));
        }
        let state = if ended.devices.any_changed() {
            "the image reads what it read, and running the same command again finishes the rebase"
        } else {
            "nothing was changed"
        };
        let end = ended.events.room.judge("the rebase", ended.end);
        end.map_err(|failure| failure.error(&ended.paths, Some(state)))?;
        let events = ended.events;
        events.meter.iter().for_each(Meter::done);
        let recorded = self.parent.as_ref();
        Ok(RebaseOutcome {
            image: path,
            image_given: self.request.image.clone(),
            format,
            backing: recorded.map(|parent| String::from_utf8_lossy(&parent.name).into_owned()),
            backing_format: recorded.map(|parent| parent.format.clone()),
            clusters_written: events.outcome.clusters_written,
            bytes_written: events.outcome.bytes_written,
            unsafe_mode: self.request.unsafe_mode,
            dry_run: self.request.dry_run,
            warnings: events.warnings,
            sandbox: ended.sandbox,
        })
    }
}
