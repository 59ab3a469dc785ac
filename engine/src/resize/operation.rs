//! The resize as an [`Operation`].

use super::events::ResizeEvents;
use super::overlays::Overlays;
use super::sizes::shrinks;
use super::{Preallocation, ResizeOutcome, ResizeRequest, SECTOR};
use crate::confine::Work;
use crate::devices::{Device, Devices};
use crate::error::{Error, Role as ErrorRole};
use crate::escape::escape_path;
use crate::image::{check_immediate_parent, check_parents, open_extra_files, Access, ChainImage, Descent, FilesOf};
use crate::operation::{
    ask, ask_below, DevicePaths, Ended, Grants, ImageSet, Meter, Named, Opener, Operation, Room, Session, Settings,
    Slot, Space,
};
use crate::plugins::IdentifyError;
use crate::sandbox::ModuleSpec;
use instar_guest_abi::{ErrorCode, MemberRole, ERROR_OK, MAX_CHAIN_DEVICES};
use instar_guest_protocol::resize::Config;
use instar_guest_protocol::Message;
use instar_plugin_api::{Context, ImageFacts, Incoming, Role};

/// The feature that records the sector size, in bytes, of an image whose disk consists of other sectors.
const LOGICAL_SECTOR: &str = "logical-sector-size";

/// A resize in progress.
pub(super) struct Resize<'q> {
    request: &'q ResizeRequest,
    format: String,
    /// The present and the requested virtual size in bytes.
    sizes: (u64, u64),
    has_backing: bool,
    /// The present length in bytes of all the image's files together.
    length: u64,
    /// What is known of the file system's space, and whether the format has no clusters.
    space: (Option<Space>, bool),
    warnings: Vec<String>,
    /// Why nothing may be changed, unless the format has a reason of its own: an option that permits it would lead there only.
    refusal: Option<Error>,
}

impl<'q> Resize<'q> {
    /// Make a resize that has not begun.
    pub(super) fn new(request: &'q ResizeRequest) -> Self {
        Self {
            request,
            format: String::new(),
            sizes: (0, 0),
            has_backing: false,
            length: 0,
            space: (None, false),
            warnings: Vec::new(),
            refusal: None,
        }
    }

    /// Whether the guest only plans.
    fn only_plans(&self) -> bool {
        self.request.dry_run || self.refusal.is_some()
    }

    /// Whether the image gets another size.
    fn changes(&self) -> bool {
        self.sizes.0 != self.sizes.1
    }

    /// Whether the new part of the disk is preallocated.
    fn preallocates(&self) -> bool {
        self.request.preallocation != Preallocation::Off
    }

    /// Whether the new part of the disk takes space: tables alone take little, and what of a file is zero may take nothing.
    fn takes_space(&self) -> bool {
        matches!(self.request.preallocation, Preallocation::Falloc | Preallocation::Full)
    }

    /// Refuse the requested size, before anything else is opened.
    fn settle_size(&mut self, image: &ChainImage<'_>) -> Result<(), Error> {
        let (path, old) = (&image.opened.path, image.facts.virtual_size);
        let refused = |(code, clause)| Error::image(path, code, clause);
        let unit = image.facts.number(LOGICAL_SECTOR).unwrap_or(SECTOR);
        let size = self.request.size.of(old, unit).map_err(refused)?;
        if self.preallocates() && size < old {
            let clause = format!("shrinks from {old} to {size} bytes, which takes no space: leave --preallocation out");
            return Err(Error::image(path, ErrorCode::BadUsage, clause));
        }
        if self.request.preallocation == Preallocation::Metadata && image.facts.cluster_size <= 1 {
            let clause = "has no metadata that could be preallocated: take falloc, which reserves the space, or full";
            return Err(Error::image(path, ErrorCode::BadUsage, clause));
        }
        if size < old && !self.request.shrink {
            self.refusal = Some(Error::image(path, ErrorCode::BadUsage, shrinks(old, size)));
        }
        self.sizes = (old, size);
        Ok(())
    }
}

impl Operation for Resize<'_> {
    type Events = ResizeEvents;
    type Outcome = ResizeOutcome;

    fn module(&self) -> ModuleSpec<'static> {
        super::MODULE
    }

    fn work(&self) -> (Work, Work) {
        (Work::OpenToCommit, Work::Commit)
    }

    fn most_processors(&self) -> usize {
        1
    }

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        Named::image(&self.request.image)
    }

    fn inside_a_machine(&self) -> Option<&'static str> {
        Some("resize inside it with block_resize")
    }

    fn access(&self) -> Access {
        // A dry run opens the image for reading only.
        if self.request.dry_run {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        }
    }

    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
        let Opener { registry, session, named, gate, access, .. } = *opener;
        let mut image = opener.open_named(self.request.format.as_deref())?;
        session.note_image("image", &image);
        self.format = image.facts.format.to_string();
        self.has_backing = image.facts.backing.is_some();
        // For an image in several files, only the headers of its extents may reveal the size: a crash may have left it
        // between two sizes.
        let failed = |error| Error::identify(&image.opened.path, &IdentifyError::Plugin(error));
        let several = !image.plugin.files(&image.opened.file).map_err(failed)?.is_empty();
        if !several {
            self.settle_size(&image)?;
        }
        let mut below = Vec::new();
        if several || self.sizes.1 > self.sizes.0 {
            // Data of a longer backing past the old end must not reappear.
            let mut descent = Descent::new(registry, gate, named.image.path(), MAX_CHAIN_DEVICES, session.cancel());
            below = descent
                .open_below(&image, Access::ReadOnly)
                .map_err(|error| error.of_image(named.image.path(), Some(ErrorRole::Ancestor)))?;
            let chain: Vec<&ChainImage<'_>> = std::iter::once(&image).chain(&below).collect();
            check_parents(&chain)?;
        } else {
            check_immediate_parent(registry, &image, gate, session.cancel())?;
        }
        let mut files = vec![FilesOf { image: &mut image, access, changes: true, gate }];
        let only_read = |image| FilesOf { image, access: Access::ReadOnly, changes: false, gate };
        files.extend(below.iter_mut().map(only_read));
        open_extra_files(registry, &mut files)?;
        if several {
            self.settle_size(&image)?;
        }
        below.iter().for_each(|layer| session.note_image("below it", layer));
        if self.changes() {
            if let Some(overlays) = Overlays::find(opener, &image, &below, self.sizes.1)? {
                if self.request.ignore_overlays {
                    self.warnings.push(overlays.warning(&image.opened.path, self.request.dry_run));
                } else {
                    self.refusal.get_or_insert_with(|| overlays.refusal(&image.opened.path));
                }
            }
        }
        if !self.changes() && self.preallocates() {
            self.warnings.push(format!(
                "'{}': has the size already, and gets no space: --preallocation gives that to what a resize adds",
                escape_path(&image.opened.path)
            ));
        }
        if self.request.dry_run {
            image.opened.check_writable()?;
        }
        let slots = below.into_iter().map(|layer| Slot::new(MemberRole::Below, layer)).collect();
        Ok(ImageSet { slots, target: Some(image), ..ImageSet::default() })
    }

    fn admit(&mut self, images: &mut ImageSet<'_>, session: &Session) -> Result<Grants, Error> {
        let Some(image) = &images.target else { return Ok(Grants::default()) };
        let parent = images.of_role(|role| role == MemberRole::Below).next().map(|parent| &parent.facts);
        let grants = admit(image, parent, self.sizes, self.preallocates(), &mut self.warnings)?;
        self.length = image.facts.file_length;
        let space = Space::for_data(image, self.sizes.1.saturating_sub(self.sizes.0));
        self.space = (space.filter(|_| self.takes_space()), image.facts.cluster_size <= 1);
        let below: Vec<&ChainImage<'_>> = images.of_role(|role| role == MemberRole::Below).collect();
        ask_below(&below, &mut self.warnings)?;
        for warning in self.warnings.iter().filter(|_| self.refusal.is_none()) {
            session.observer().warning(warning);
        }
        Ok(grants)
    }

    fn payload(&self) -> Vec<u8> {
        let (preallocate, dry_run) = (self.preallocates(), self.only_plans());
        Config { virtual_size: self.sizes.1, preallocate, dry_run, has_backing: self.has_backing }.encode_to_vec()
    }

    fn serve(&mut self, devices: &mut Devices, paths: &DevicePaths, session: &Session) -> Result<ResizeEvents, Error> {
        devices.set_zero_writes(self.request.preallocation.zero_writes());
        devices.pace_mut().stop_when(session.cancel().clone());
        let longest = paths.target().filter_map(|number| devices.device(number)).map(Device::max_length);
        let longest = longest.fold(0, u64::saturating_add);
        let observer = session.observer();
        let meter = Meter::new(observer.clone(), longest, devices, paths.target(), observer.wants_progress());
        devices.pace_mut().watched_by(Box::new(meter.clone()));
        let filled = if self.preallocates() { self.sizes.1.saturating_sub(self.sizes.0) } else { 0 };
        let (meter, dry_run, room) = (Some(meter), self.only_plans(), Room::of(self.space.0));
        let least = if self.space.1 { filled } else { 0 };
        let sizes = self.sizes;
        // A disk grows at its end, which lies in the last of several files.
        let reserves = paths.target().last().filter(|_| self.takes_space()).map(|number| (number, self.length));
        Ok(ResizeEvents { reserves, sizes, longest, dry_run, meter, filled, room, least, ..ResizeEvents::default() })
    }

    fn finish(self, ended: Ended<ResizeEvents>) -> Result<ResizeOutcome, Error> {
        let (old, new) = self.sizes;
        let state = if ended.devices.any_changed() && self.preallocates() {
            format!(
                "the image has {old} bytes or {new}, as `instar info` says, and reads as before; what has no space yet takes it when \
                 something is written there"
            )
        } else if ended.devices.any_changed() {
            format!(
                "the image has {old} bytes or {new}, as `instar info` says, and reads as before; to finish, run the command with \
                 the size {new}"
            )
        } else {
            "nothing was changed".to_owned()
        };
        if let Some((device, _)) = ended.events.reserves {
            ended.devices.release_behind(device);
        }
        let end = ended.events.room.judge("what is new of the disk", ended.end);
        let end = ended.events.unreserved.map_or(end, Err);
        end.map_err(|failure| failure.error(&ended.paths, Some(&state)))?;
        if let Some(refusal) = self.refusal {
            return Err(refusal);
        }
        ended.events.meter.iter().for_each(Meter::done);
        Ok(ResizeOutcome {
            format: self.format,
            old_virtual_size: old,
            virtual_size: ended.events.virtual_size,
            dry_run: self.request.dry_run,
            sandbox: ended.sandbox,
            warnings: self.warnings,
        })
    }
}

/// Ask the image's plugin whether the image can get another size, and how long its files may become.
fn admit(
    image: &ChainImage<'_>,
    parent: Option<&ImageFacts>,
    (old, new): (u64, u64),
    preallocate: bool,
    warnings: &mut Vec<String>,
) -> Result<Grants, Error> {
    let path = &image.opened.path;
    let unit = image.facts.unit();
    // Zeroes hide the data of a longer parent past the old end, and preallocated parts take space.
    let shown = parent.map_or(0, |parent| parent.virtual_size.min(new).saturating_sub(old));
    let bytes = if preallocate { new.saturating_sub(old) } else { shown };
    let max_clusters = if bytes == 0 { 0 } else { bytes.div_ceil(unit).saturating_add(1) };
    let incoming = Incoming { virtual_size: new.max(old), cluster_size: unit, max_clusters, identity_recorded: false };
    let longest = ask(image, Role::Write, "get another size", &Context::writing(parent, incoming), warnings)?;
    // A format may require parent and child to have one size: otherwise the chain could not be read any more.
    if let Some(parent) = parent {
        let facts = ImageFacts { virtual_size: new, ..image.facts.clone() };
        let verdict = image.plugin.verdict(Role::Read, &facts, &Context::reading(Some(parent), false));
        if verdict.code != ERROR_OK {
            let code = ErrorCode::from_u32(verdict.code).unwrap_or(ErrorCode::PluginRefused);
            let clause = format!("could not be read above its parent with {new} bytes: {}", verdict.reason);
            return Err(Error::image(path, code, clause));
        }
    }
    Ok(Grants { target: longest.max(image.facts.file_length), ..Grants::default() })
}
