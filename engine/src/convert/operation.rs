//! The conversion as an [`Operation`].

use super::end::{allocate, ignored, salvaged};
use super::existing::{refuse_device, Existing};
use super::in_parts::{left_over, parts_of};
use super::parent::{divide, Layers};
use super::request::{ConvertOutcome, ConvertRequest};
use crate::bytes::Bytes;
use crate::commit::{room_for_bitmaps, CommitEvents, PlanBounds};
use crate::confine::Work;
use crate::create::{options_of, plugin_of, write_to, NewFile, Parts};
use crate::devices::{Cache, Device, Devices, Workers};
use crate::error::Error;
use crate::escape::{escape, escape_bytes, escape_path};
use crate::image::{add_new_files, Access, ChainImage, NamedFile, OpenedFile};
use crate::lookup::{Directory, Identity};
use crate::operation::{
    ask, DevicePaths, Ended, Grants, ImageSet, Meter, Named, Opener, Operation, Room, Session, Settings, Slot, Space,
};
use crate::plugins::{Plugin, Registry};
use crate::rebase::named_parent;
use crate::sandbox::ModuleSpec;
use instar_guest_abi::{ErrorCode, MemberRole, Phase};
use instar_guest_protocol::convert::Config;
use instar_guest_protocol::Message;
use instar_plugin_api::{BackingPointer, Context, CreateSpec, ImageFacts, Incoming, Role, ROLE_SINK};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The state of the files after a failure.
const NOTHING: &str = "no image was made";
const UNCHANGED: &str = "nothing was changed";
const PART: &str = "a part of the disk was written into it, in place: run the command again";
/// The reason to refuse `-c`.
const NOT_COMPRESSED: &str =
    "would not be compressed, as images of its kind cannot be: leave out -c, or choose -O qcow2, or -O vmdk \
                              with -o subformat=streamOptimized";
/// The unit in bytes to which each of several disks is extended.
const SECTOR: u64 = 512;

/// A conversion in progress.
pub struct Convert<'q> {
    request: &'q ConvertRequest,
    /// Threads that copy in parallel, if the system permits them.
    workers: Option<Workers>,
    /// The new image, which has no name yet, or the reason why it cannot be made.
    new: Option<Result<NewFile, Error>>,
    /// Its other files, if it has any.
    parts: Option<Parts>,
    /// The image that is written in place, or the reason why it cannot be.
    existing: Option<Result<Existing, Error>>,
    /// The claim to a block device that is written in place, which keeps it from being mounted until the end.
    claim: Option<OwnedFd>,
    /// The image that is replaced, locked until the end.
    replaced: Option<OpenedFile>,
    /// Whether the target has to be filled with zeroes, because it does not read as zeroes by itself.
    writes_zeroes: bool,
    formats: (String, String),
    /// Virtual sizes in bytes.
    sizes: (u64, u64),
    /// Bytes of the source's files.
    length: u64,
    warnings: Vec<String>,
    bounds: PlanBounds,
    space: Option<Space>,
}

impl<'q> Convert<'q> {
    /// Make a conversion that has not begun.
    pub fn new(request: &'q ConvertRequest) -> Self {
        Self {
            request,
            workers: None,
            new: None,
            parts: None,
            existing: None,
            claim: None,
            replaced: None,
            writes_zeroes: false,
            formats: Default::default(),
            sizes: (0, 0),
            length: 0,
            warnings: Vec::new(),
            bounds: PlanBounds::default(),
            space: None,
        }
    }

    /// Refuse to overwrite a source: a file with this identity, or the file below this device.
    fn refuse_what_is_read<'i, 'r: 'i>(
        &self,
        layers: impl IntoIterator<Item = &'i ChainImage<'r>>,
        (identity, below): (Identity, Option<Identity>),
    ) -> Result<(), Error> {
        let same = |file: &OpenedFile| {
            file.identity == identity || file.below == Some(identity) || below == Some(file.identity)
        };
        let Some(layer) = layers.into_iter().find(|layer| layer.all_files().any(same)) else { return Ok(()) };
        let clause = format!(
            "would be written over, and is a part of what is read ('{}'): choose another name",
            escape_path(&layer.opened.path)
        );
        Err(Error::image(&self.request.target, ErrorCode::ChainLoop, clause))
    }

    /// Create the image, for a disk of `size` bytes, in the files that have no names yet.
    fn create<'r>(
        &mut self,
        registry: &'r Registry,
        plugin: &Plugin,
        size: u64,
        parent: Option<&ImageFacts>,
        new: &mut NewFile,
    ) -> Result<ChainImage<'r>, Error> {
        let path = &self.request.target;
        let refused = |clause: String| Error::image(path, ErrorCode::UnsupportedFormat, clause);
        let spec = CreateSpec {
            virtual_size: size,
            // Not the name of a link: the other files' names begin with this name, and lie beside it.
            file_name: new.name().as_bytes().to_vec().into(),
            backing: self.pointer().into(),
            backing_facts: parent.cloned().into(),
            options: options_of(&self.request.options),
        };
        let image = plugin.create(&spec).map_err(|failure| Error::plugin(path, &failure))?;
        write_to(new.file(), path, image.length, &image.regions, &image.reserved)?;
        let opened = new.open()?.ok_or_else(begun_twice)?;
        let mut target = opened.identify_as(registry, Some(plugin.name()), "-O")?;
        match self.parts.as_mut().filter(|_| !image.files.is_empty()) {
            Some(parts) => add_new_files(&mut target, parts.lay_out(new, &image.files)?)?,
            None if image.files.is_empty() => self.parts = None,
            None => {
                return Err(refused(
                    "would be an image in several files, and only a kind that -o chooses can be".into(),
                ))
            }
        }
        let has = target.facts.virtual_size;
        if has < size {
            return Err(refused(format!(
                "would have a disk of {}, and one of {} is converted",
                Bytes(has),
                Bytes(size)
            )));
        }
        Ok(target)
    }

    /// The new image's record of its backing file.
    fn pointer(&self) -> Option<BackingPointer> {
        let (name, format) = self.request.backing.as_ref()?;
        Some(BackingPointer::new(name.as_bytes().to_vec(), Some(format.as_bytes().to_vec())))
    }

    /// Refuse bitmaps that were not saved, unless the operator skips them.
    fn refuse_broken_bitmaps(&self, top: &ChainImage<'_>) -> Result<(), Error> {
        let bitmaps = top.facts.bitmaps.as_ref().map_or(&[][..], |bitmaps| bitmaps.as_slice());
        let broken = bitmaps.iter().find(|bitmap| bitmap.in_use && !self.request.skip_broken_bitmaps);
        match broken.filter(|_| self.request.bitmaps) {
            None => Ok(()),
            Some(bitmap) => {
                let clause = format!(
                    "has a bitmap that was not saved when it was closed, '{}': add --skip-broken-bitmaps to do without it",
                    escape_bytes(&bitmap.name)
                );
                Err(Error::image(&top.opened.path, ErrorCode::UnsupportedFormat, clause))
            }
        }
    }
}

/// The length in bytes of disks that follow each other.
fn size_of(path: &Path, disks: &[&ChainImage<'_>]) -> Result<u64, Error> {
    if let [only] = disks {
        return Ok(only.facts.virtual_size);
    }
    let whole = |disk: &&ChainImage<'_>| disk.facts.virtual_size.checked_next_multiple_of(SECTOR);
    let sum = disks.iter().map(whole).try_fold(0u64, |sum, size| sum.checked_add(size?));
    sum.filter(|size| i64::try_from(*size).is_ok()).ok_or_else(|| {
        Error::image(
            path,
            ErrorCode::UnsupportedFormat,
            "would have a disk of more than 2^63 bytes: convert fewer images at once",
        )
    })
}

impl Operation for Convert<'_> {
    type Events = CommitEvents;
    type Outcome = ConvertOutcome;

    fn module(&self) -> ModuleSpec<'static> {
        super::MODULE
    }

    fn work(&self) -> (Work, Work) {
        (Work::OpenToConvert, Work::Convert)
    }

    fn most_processors(&self) -> usize {
        self.request.processors.unwrap_or(usize::MAX)
    }

    fn reads_below(&self) -> bool {
        true
    }

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        let others = self.request.others.iter().map(|other| NamedFile::new(other)).collect();
        // As the new image will find it.
        let target = NamedFile::new(&self.request.target);
        let base = self.request.backing.as_ref().and_then(|(name, _)| named_parent(&target, name));
        Named { base, others, ..Named::image(&self.request.source) }
    }

    fn access(&self) -> Access {
        Access::to_read(self.request.force_share)
    }

    fn acquire(&mut self, named: &Named, registry: &Registry) {
        // Opening a missing source reports it; nothing has to be created for that.
        if named.image.identity().is_none() {
            return;
        }
        if self.request.in_place {
            self.existing = Some(Existing::open(&self.request.target));
        } else {
            let target = &self.request.target;
            let begun = refuse_device(target, &self.request.target_format).and_then(|()| NewFile::begin(target));
            self.new = Some(begun.and_then(|new| {
                self.parts = parts_of(self.request, registry, &new)?;
                Ok(new)
            }));
        }
        // The layers below a short image may be long; a raw image has none.
        let short = named.image.length().is_some_and(|length| length < Workers::MUCH);
        if self.request.rate_limit == 0
            && !self.request.salvage
            && !(short && self.request.format.as_deref() == Some("raw"))
        {
            // Without them, one thread does it all.
            self.workers = Workers::start().ok();
        }
    }

    fn names_in(&self) -> Option<&Directory> {
        self.new.as_ref()?.as_ref().ok().map(NewFile::directory)
    }

    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
        let Opener { registry, session, .. } = *opener;
        let plugin = plugin_of(registry, &self.request.target_format)?;
        if !plugin.can_create() || plugin.roles() & ROLE_SINK == 0 {
            let clause = format!("cannot be made with this version of the {} plugin", plugin.name());
            return Err(Error::image(&self.request.target, ErrorCode::UnsupportedFormat, clause));
        }
        let base = self.request.backing.as_ref().map(|(_, format)| format.as_str());
        let mut layers = opener.open_chain_onto(self.request.format.as_deref(), base)?;
        if let (Some(top), Some(snapshot)) = (layers.first_mut(), &self.request.snapshot) {
            top.select_snapshot(snapshot)?;
        }
        let others = opener.open_others(self.request.format.as_deref(), layers.len())?;
        let Layers { copied, below, hides } = match (&self.request.backing, &opener.named.base) {
            (Some(_), Some(base)) => divide(self.request, opener, base, layers, &mut self.warnings)?,
            (Some((name, _)), None) => {
                let text = format!("'{}' is not the name of a file, which a backing file has to be", escape(name));
                return Err(Error::new(ErrorCode::OpenFailed, text));
            }
            (None, _) => Layers { copied: layers, ..Layers::default() },
        };
        self.writes_zeroes = hides || (self.request.in_place && !self.request.target_is_zero);
        let disks: Vec<Vec<ChainImage<'_>>> = std::iter::once(copied).chain(others).collect();
        disks.iter().flatten().for_each(|layer| session.note_image("read", layer));
        below.iter().for_each(|layer| session.note_image("below the new image", layer));
        let tops: Vec<&ChainImage<'_>> = disks.iter().filter_map(|layers| layers.first()).collect();
        let size = size_of(&self.request.target, &tops)?;
        let top = tops.first().ok_or_else(begun_twice)?;
        self.refuse_broken_bitmaps(top)?;
        let source_format = top.facts.format.to_string();
        let read = || disks.iter().flatten().chain(&below);
        let target = match self.existing.take() {
            Some(existing) => {
                let existing = existing?;
                self.refuse_what_is_read(read(), existing.identity())?;
                let (target, claim) = existing.identify(registry, &self.request.target_format, size)?;
                self.claim = claim;
                target
            }
            None => {
                let mut new = self.new.take().ok_or_else(begun_twice)??;
                if let Some(replaced) = new.replaces() {
                    self.refuse_what_is_read(read(), (replaced, None))?;
                }
                self.replaced = new.lock_replaced()?;
                let left = self.replaced.as_ref().and_then(|replaced| left_over(registry, replaced));
                self.warnings.extend(left);
                let parent = below.first().map(|parent| &parent.facts);
                let target = self.create(registry, plugin, size, parent, &mut new)?;
                self.new = Some(Ok(new));
                target
            }
        };
        session.note_image(if self.request.in_place { "written" } else { "new" }, &target);
        self.formats = (source_format, target.facts.format.to_string());
        self.sizes = (size, target.facts.virtual_size);
        self.length = read().map(ChainImage::length).fold(0, u64::saturating_add);
        let read = ImageSet::views(disks);
        let below = below.into_iter().map(|layer| Slot::new(MemberRole::Below, layer));
        Ok(ImageSet {
            target: Some(target),
            slots: read.slots.into_iter().chain(below).collect(),
            ..ImageSet::default()
        })
    }

    fn admit(&mut self, images: &mut ImageSet<'_>, _: &Session) -> Result<Grants, Error> {
        let slots = &images.slots;
        for (slot, next) in slots.iter().zip(slots.iter().skip(1).map(Some).chain([None])) {
            let parent = next.filter(|next| next.group == slot.group).map(|next| &next.image.facts);
            ask(&slot.image, Role::Below, "be read", &Context::reading(parent, false), &mut self.warnings)?;
        }
        let layers: Vec<&ChainImage<'_>> = images.of_role(|role| role == MemberRole::Read).collect();
        let parent = images.of_role(|role| role == MemberRole::Below).next().map(|parent| &parent.facts);
        let (Some(top), Some(target)) = (layers.first(), &images.target) else { return Err(begun_twice()) };
        let mut incoming = Incoming::from_layers(layers.iter().map(|layer| &layer.facts)).ok_or_else(begun_twice)?;
        let ConvertRequest { in_place, allocate, bitmaps, compress, .. } = *self.request;
        if self.request.snapshot.is_some() || !self.request.others.is_empty() || self.writes_zeroes || allocate {
            // The header counts the image's own disk, and not additional writes.
            incoming.virtual_size = self.sizes.0;
            incoming.max_clusters = incoming.virtual_size.div_ceil(incoming.cluster_size.max(1));
        }
        if self.request.compress && !target.facts.compresses {
            return Err(Error::image(&self.request.target, ErrorCode::UnsupportedFormat, NOT_COMPRESSED));
        }
        let longest = ask(target, Role::Write, "be written", &Context::writing(parent, incoming), &mut self.warnings)?;
        let room = if bitmaps { room_for_bitmaps(&target.facts, [&top.facts], target.facts.virtual_size) } else { 0 };
        let target_length = longest.max(target.facts.file_length).saturating_add(room);
        self.bounds = PlanBounds { virtual_size: target.facts.virtual_size, ..PlanBounds::of(top, target) };
        // The size of a compressed image shows only when it is written: a full file system ends the conversion, and
        // leaves nothing.
        self.space = Space::of(target, &layers).filter(|_| !in_place && !compress);
        Ok(Grants { target: target_length, compress, ..Grants::default() })
    }

    fn payload(&self) -> Vec<u8> {
        let ConvertRequest { allocate, bitmaps, salvage, sparse, compress, in_place, .. } = *self.request;
        // The guest that compresses clusters sees which of them are zero. Unreadable data becomes zeroes in copies, but
        // an error if the guest has to look at it.
        let sparse = if compress || salvage || allocate { 0 } else { sparse };
        Config { write_zeroes: self.writes_zeroes, allocate, bitmaps, sparse, salvage, new_target: !in_place }
            .encode_to_vec()
    }

    fn serve(&mut self, devices: &mut Devices, paths: &DevicePaths, session: &Session) -> Result<CommitEvents, Error> {
        let ConvertRequest { cache, rate_limit, .. } = *self.request;
        devices.set_workers(self.workers.take());
        paths.set_cache(devices, cache)?;
        if !self.request.in_place {
            devices.leave_flushes_to_the_end();
        }
        if self.request.salvage {
            paths.sources().for_each(|number| devices.salvage(number));
        }
        let observer = session.observer();
        let meter = Meter::attend(devices, paths, session, cache, self.length);
        devices.pace_mut().limit(rate_limit);
        let longest = paths.target().filter_map(|number| devices.device(number)).map(Device::max_length);
        Ok(CommitEvents {
            last_phase: Phase::Target,
            keep_overlay: true,
            bounds: PlanBounds { longest: longest.fold(0, u64::saturating_add), ..self.bounds },
            meter: Some(meter),
            room: Room::of(self.space),
            warnings: self.warnings.clone(),
            bitmaps: self.request.bitmaps.then(Vec::new),
            undecoded: self.request.salvage.then_some(0),
            disks: std::iter::once(&self.request.source).chain(&self.request.others).cloned().collect(),
            names: (self.request.source.clone(), self.request.target.clone()),
            observer: Some(observer.clone()),
            ..CommitEvents::default()
        })
    }

    fn finish(self, ended: Ended<CommitEvents>) -> Result<ConvertOutcome, Error> {
        let state = match (self.request.in_place, ended.devices.any_changed()) {
            (false, _) => NOTHING,
            (true, false) => UNCHANGED,
            (true, true) => PART,
        };
        if ended.end.is_ok() {
            allocate(self.request, &ended)?;
        }
        let events = ended.events;
        events.room.judge("the image", ended.end).map_err(|failure| failure.error(&ended.paths, Some(state)))?;
        let mut warnings = events.warnings;
        let (devices, observer) = (&ended.devices, events.observer);
        let unread = ended.paths.sources().flat_map(|number| salvaged(devices, &ended.paths, number));
        for line in events.ignored.iter().map(|damage| ignored(&ended.paths, damage)).chain(unread) {
            observer.iter().for_each(|observer| observer.warning(&line));
            warnings.push(line);
        }
        match self.new {
            Some(new) => {
                let mut new = new?;
                let durable = self.request.cache != Cache::Unsafe;
                match self.parts {
                    Some(parts) => parts.publish(&mut new, durable)?,
                    None => new.publish(durable)?,
                }
            }
            // The guest has flushed a target in place.
            None if self.request.in_place => {}
            None => return Err(begun_twice()),
        }
        events.meter.iter().for_each(Meter::done);
        Ok(ConvertOutcome {
            source_format: self.formats.0,
            target_format: self.formats.1,
            source_virtual_size: self.sizes.0,
            target_virtual_size: self.sizes.1,
            bytes_converted: events.outcome.bytes_committed,
            sandbox: ended.sandbox,
            warnings,
        })
    }
}

/// The error for steps of an operation in the wrong order: a bug of this program.
fn begun_twice() -> Error {
    Error::new(ErrorCode::InternalOverflow, "a conversion without a source or a target: please report this")
}
