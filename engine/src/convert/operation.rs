//! The conversion as an [`Operation`].

use super::{ConvertOutcome, ConvertRequest};
use crate::commit::{CommitEvents, Meter, PlanBounds, Space};
use crate::confine::Work;
use crate::create::{options_of, plugin_of, write_to, NewFile};
use crate::devices::{Cache, Device, Devices, Workers};
use crate::error::Error;
use crate::escape::escape_path;
use crate::image::{Access, ChainImage, OpenedFile};
use crate::lookup::Directory;
use crate::operation::{
    ask, DevicePaths, Ended, Grants, GuestFailure, ImageSet, Named, Opener, Operation, Session, Settings,
};
use crate::plugins::{Plugin, Registry};
use crate::sandbox::ModuleSpec;
use instar_guest_abi::{ErrorCode, Phase, DEVICE_OUTPUT};
use instar_plugin_api::std_types::ROption;
use instar_plugin_api::{Context, CreateSpec, Incoming, Role, ROLE_SINK};
use std::os::unix::ffi::OsStrExt;

/// What the files are like after a failure.
const NOTHING: &str = "no image was made";

/// A conversion on its way.
pub struct Convert<'q> {
    request: &'q ConvertRequest,
    /// Threads that copy side by side, if the system has them.
    workers: Option<Workers>,
    /// The new image, which has no name yet, or why there can be none.
    new: Option<Result<NewFile, Error>>,
    /// The image that is replaced, locked to the end.
    replaced: Option<OpenedFile>,
    formats: (String, String),
    /// Virtual sizes in bytes.
    sizes: (u64, u64),
    /// Bytes of the files that are read.
    length: u64,
    warnings: Vec<String>,
    bounds: PlanBounds,
    space: Option<Space>,
}

impl<'q> Convert<'q> {
    /// A conversion that was not begun.
    pub fn new(request: &'q ConvertRequest) -> Self {
        Self {
            request,
            workers: None,
            new: None,
            replaced: None,
            formats: Default::default(),
            sizes: (0, 0),
            length: 0,
            warnings: Vec::new(),
            bounds: PlanBounds::default(),
            space: None,
        }
    }

    /// Refuse to replace what is read, and whatever somebody uses.
    fn lock_replaced(&mut self, layers: &[ChainImage<'_>], new: &mut NewFile) -> Result<(), Error> {
        let Some(replaced) = new.replaces() else { return Ok(()) };
        let read = layers
            .iter()
            .find(|layer| layer.all_files().any(|file| file.identity == replaced || file.below == Some(replaced)));
        if let Some(layer) = read {
            let clause = format!(
                "would be replaced, and is a part of what is read ('{}'): choose another name",
                escape_path(&layer.opened.path)
            );
            return Err(Error::image(&self.request.target, ErrorCode::ChainLoop, clause));
        }
        self.replaced = new.lock_replaced()?;
        Ok(())
    }

    /// Create the image, for a disk of so many bytes, in the file that has no name yet.
    fn create<'r>(
        &self,
        registry: &'r Registry,
        plugin: &Plugin,
        size: u64,
        new: &mut NewFile,
    ) -> Result<ChainImage<'r>, Error> {
        let path = &self.request.target;
        let refused = |clause: String| Error::image(path, ErrorCode::UnsupportedFormat, clause);
        let spec = CreateSpec {
            virtual_size: size,
            file_name: path.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default().into(),
            backing: ROption::RNone,
            backing_facts: ROption::RNone,
            options: options_of(&self.request.options),
        };
        let image = plugin.create(&spec).map_err(|failure| Error::plugin(path, &failure))?;
        if !image.files.is_empty() {
            return Err(refused(
                "would be an image in several files, which cannot appear all at once: choose a kind in one file with -o".into(),
            ));
        }
        write_to(new.file(), path, image.length, &image.regions, &image.reserved)?;
        let opened = new.open()?.ok_or_else(begun_twice)?;
        let target = opened.identify_as(registry, Some(plugin.name()), "-O")?;
        let has = target.facts.virtual_size;
        if has < size {
            return Err(refused(format!("would have a disk of {has} bytes, and one of {size} bytes is converted")));
        }
        Ok(target)
    }
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

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        Named::image(&self.request.source)
    }

    fn access(&self) -> Access {
        Access::to_read(self.request.force_share)
    }

    fn acquire(&mut self, named: &Named) {
        // A source that is not there is told by opening it; nothing has to be made for that.
        if named.image.identity().is_none() {
            return;
        }
        self.new = Some(NewFile::begin(&self.request.target));
        if self.request.rate_limit == 0 {
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
        let mut layers = opener.open_chain(self.request.format.as_deref())?;
        if let (Some(top), Some(snapshot)) = (layers.first_mut(), &self.request.snapshot) {
            top.select_snapshot(snapshot)?;
        }
        layers.iter().for_each(|layer| session.note_image("read", layer));
        let mut new = self.new.take().ok_or_else(begun_twice)??;
        self.lock_replaced(&layers, &mut new)?;
        let top = layers.first().ok_or_else(begun_twice)?;
        let size = top.facts.virtual_size;
        let target = self.create(registry, plugin, size, &mut new)?;
        session.note_image("new", &target);
        self.formats = (top.facts.format.to_string(), target.facts.format.to_string());
        self.sizes = (size, target.facts.virtual_size);
        self.length = layers.iter().map(ChainImage::length).fold(0, u64::saturating_add);
        self.new = Some(Ok(new));
        Ok(ImageSet { target: Some(target), ..ImageSet::read(layers) })
    }

    fn admit(&mut self, images: &mut ImageSet<'_>, _: &Session) -> Result<Grants, Error> {
        let layers: Vec<&ChainImage<'_>> = images.of_role(|_| true).collect();
        for (index, layer) in layers.iter().enumerate() {
            let parent = layers.get(index + 1).map(|parent| &parent.facts);
            ask(layer, Role::Below, "be read", &Context::reading(parent, false), &mut self.warnings)?;
        }
        let (Some(top), Some(target)) = (layers.first(), &images.target) else { return Err(begun_twice()) };
        let mut incoming = Incoming::from_layers(layers.iter().map(|layer| &layer.facts)).ok_or_else(begun_twice)?;
        if self.request.snapshot.is_some() {
            // What the header counts is of the image's own disk.
            incoming.max_clusters = incoming.virtual_size.div_ceil(incoming.cluster_size.max(1));
        }
        let longest = ask(target, Role::Write, "be written", &Context::writing(None, incoming), &mut self.warnings)?;
        let target_length = longest.max(target.facts.file_length);
        self.bounds = PlanBounds::of(top, target);
        self.space = Space::of(target, &layers);
        Ok(Grants { target: target_length, ..Grants::default() })
    }

    fn serve(&mut self, devices: &mut Devices, paths: &DevicePaths, session: &Session) -> Result<CommitEvents, Error> {
        let ConvertRequest { cache, rate_limit, .. } = *self.request;
        devices.set_workers(self.workers.take());
        paths.set_cache(devices, cache)?;
        let observer = session.observer();
        let flushes = observer.wants_progress() && cache != Cache::Unsafe;
        let meter = Meter::new(observer.clone(), self.length, devices, paths.target(), flushes);
        let pace = devices.pace_mut();
        pace.stop_when(session.cancel().clone());
        pace.limit(rate_limit);
        pace.watched_by(Box::new(meter.clone()));
        let longest = paths.target().filter_map(|number| devices.device(number)).map(Device::max_length);
        Ok(CommitEvents {
            last_phase: Phase::Target,
            keep_overlay: true,
            bounds: PlanBounds { longest: longest.fold(0, u64::saturating_add), ..self.bounds },
            meter: Some(meter),
            space: self.space,
            warnings: self.warnings.clone(),
            observer: Some(observer.clone()),
            ..CommitEvents::default()
        })
    }

    fn finish(self, ended: Ended<CommitEvents>) -> Result<ConvertOutcome, Error> {
        let events = &ended.events;
        let end = match events.lacking {
            Some((needed, free)) => {
                let text = format!("the image needs {needed} bytes of the file system, which has {free} free");
                let lacking = GuestFailure::ended(ErrorCode::NoSpace, text);
                Err(GuestFailure { device: Some(DEVICE_OUTPUT), ..lacking })
            }
            None => ended.end,
        };
        end.map_err(|failure| failure.error(&ended.paths, Some(NOTHING)))?;
        let mut new = self.new.ok_or_else(begun_twice)??;
        new.publish(self.request.cache != Cache::Unsafe)?;
        events.meter.iter().for_each(Meter::done);
        Ok(ConvertOutcome {
            source_format: self.formats.0,
            target_format: self.formats.1,
            source_virtual_size: self.sizes.0,
            target_virtual_size: self.sizes.1,
            bytes_converted: events.outcome.bytes_committed,
            sandbox: ended.sandbox,
            warnings: self.warnings,
        })
    }
}

/// The order of an operation was not kept: a mistake of this program.
fn begun_twice() -> Error {
    Error::new(ErrorCode::InternalOverflow, "a conversion without a source or a target: please report this")
}
