//! An image that gets another parent, and reads what it read: when that is done, when a request fails, and at every instant of
//! a power loss.

use instar_guest_abi::{device_flags, DeviceConfig, DeviceRole, ImageId, DEVICE_OUTPUT, PARENT_ROOM};
use instar_guest_sdk::conformance::{ParentKit, Recorded};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_guest_sdk::rebase::{rebase, Content, Rebase, RebaseFailure, Step};
use instar_guest_sdk::{BlockIo, Parent, Source};
use instar_guest_view::{Ancestors, Differences, View};
use std::cell::Cell;

/// What an image may be backed by: the name that it records, and the devices of the layers, the top-most first. Without a name
/// there are no layers.
pub type Below<'a> = (&'a [u8], &'a [u32]);

/// Layers that are open, each with its device, the top-most first.
type Layers = Vec<(u32, Box<dyn Source>)>;

/// A rebase of [`DEVICE_OUTPUT`]. All images are of one format.
pub struct Rebased<'a> {
    /// The format.
    pub kit: &'a dyn ParentKit,
    /// Its name.
    pub format: &'a str,
    /// The images.
    pub files: Files,
    /// What is below it before. The image records that.
    pub old: Below<'a>,
    /// What is to be below it.
    pub new: Below<'a>,
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Bytes that were written before the parent was changed, as planned.
    pub bytes: u64,
    /// States that a power loss can leave.
    pub states: usize,
    /// Of these, the ones that name the old parent although something was changed.
    pub between: usize,
}

/// Rebase an image of a format that records names and identities from one image of that format onto another, each of which stands
/// alone, and verify all that is promised. There is something to write, and a moment at which a power loss leaves the old name.
///
/// # Panics
/// If a promise is broken, or nothing was tried.
pub fn onto_another(kit: &dyn ParentKit, format: &str, crashes: Crashes, images: [Vec<u8>; 3]) {
    const OLD: u32 = 3;
    const NEW: u32 = 4;
    let files: Files = [DEVICE_OUTPUT, OLD, NEW].into_iter().zip(images).collect();
    let rebase = Rebased { kit, format, files, old: (b"old", &[OLD]), new: (b"new", &[NEW]) };
    let (seen, _) = rebase.verify(crashes);
    println!("{seen:?}");
    assert!(seen.bytes > 0 && seen.states > 5 && seen.between > 0, "{seen:?}");
}

impl Rebased<'_> {
    /// Rebase, and verify all that is promised. Returns what was looked at, and the images afterwards.
    ///
    /// # Panics
    /// If a promise is broken.
    #[must_use]
    pub fn verify(&self, crashes: Crashes) -> (Seen, Files) {
        let expected = self.read(&self.files);
        let mut io = MemoryDevices::new(self.files.clone());
        let dry = self.run(&mut io, true);
        assert!(io.log.is_empty(), "a dry run has changed something");
        let done = self.run(&mut io, false);
        assert!(done.is_ok() && done == dry, "{done:?}, planned {dry:?}");
        assert!(io.unflushed().is_empty(), "at the end, something is not flushed");
        self.finished(&io.files, &expected);
        let mut seen = Seen { bytes: done.unwrap_or_default(), ..Seen::default() };

        for request in 0..io.executed() {
            let mut failing = MemoryDevices::new(self.files.clone());
            failing.fail_at = Some(request);
            match self.run(&mut failing, false) {
                Ok(_) => self.finished(&failing.files, &expected),
                Err(RebaseFailure { step: Step::Check | Step::Plan, .. }) => {
                    assert!(failing.log.is_empty(), "changed before request {request} failed, while planning");
                }
                Err(_) => self.instant(&failing.files, &expected),
            }
            self.again(failing.files, &expected);
        }
        seen.states = crashes.each_again(&self.files, &io.log, &mut |files| {
            self.instant(&files, &expected);
            let is_old = self.named(&files) == self.named(&self.files);
            seen.between += usize::from(is_old && image(&files) != image(&self.files));
            self.again(files, &expected)
        });
        (seen, io.files)
    }

    /// What the image records of its parent, if it has one.
    fn named(&self, files: &Files) -> Option<Recorded> {
        self.kit.recorded(image(files))
    }

    /// The new parent.
    fn parent(&self) -> Option<Parent<'_>> {
        let (name, layers) = self.new;
        let top = self.files.get(layers.first()?)?;
        let number = *layers.first()?;
        let mut io = MemoryDevices::new([(number, top.clone())]);
        let opened = self.kit.open_source(&mut io, &self.device(&self.files, number));
        // That of a VHD is known to its host half only.
        let identity = opened.ok().and_then(|source| source.identity());
        let identity = identity.or_else(|| ImageId::new(&[7; 16]).filter(|_| self.format == "vpc"));
        let virtual_size = self.kit.info(top).virtual_size;
        Some(Parent { name, format: self.format, identity, virtual_size })
    }

    /// What the image is to record.
    fn expected(&self) -> Option<Recorded> {
        self.parent().map(|parent| self.kit.expected(&parent))
    }

    /// The layers that the image names.
    fn below(&self, files: &Files) -> &[u32] {
        let name = self.named(files);
        if name == self.expected() {
            return self.new.1;
        }
        assert_eq!(name, self.named(&self.files), "it names neither the new parent nor the old one");
        self.old.1
    }

    /// What the image reads, through the layers that it names.
    fn read(&self, files: &Files) -> Vec<u8> {
        let mut below: Option<Vec<u8>> = None;
        for device in self.below(files).iter().rev() {
            below = Some(self.kit.content(&files[device], below.as_deref()));
        }
        self.kit.content(image(files), below.as_deref())
    }

    fn device(&self, files: &Files, number: u32) -> DeviceConfig {
        let bytes = &files[&number];
        let info = self.kit.info(bytes);
        DeviceConfig {
            flags: device_flags::PRESENT | device_flags::WRITABLE | device_flags::KEEPS_IDENTITY,
            device: number,
            file_length: bytes.len() as u64,
            max_length: 1 << 40,
            virtual_size: info.virtual_size,
            cluster_size: info.cluster_size,
            ..DeviceConfig::default()
        }
    }

    fn layers(&self, io: &mut MemoryDevices, layers: &[u32]) -> Result<Layers, RebaseFailure> {
        let open = |number: &u32| {
            let device = self.device(&io.files, *number);
            let source =
                self.kit.open_source(io, &device).map_err(|error| RebaseFailure { step: Step::Check, error })?;
            Ok((*number, source))
        };
        layers.iter().map(open).collect()
    }

    /// Rebase as `guest/rebase` does. Returns how many bytes are written before the switch.
    fn run(&self, io: &mut MemoryDevices, dry_run: bool) -> Result<u64, RebaseFailure> {
        let at = |error| RebaseFailure { step: Step::Check, error };
        let overlay = self.device(&io.files, DEVICE_OUTPUT);
        let old = self.below(&io.files);
        let parent = self.parent();
        io.hold([(DeviceRole::Rebased, &overlay)]);
        let views = [View::new(self.layers(io, old)?), View::new(self.layers(io, self.new.1)?)];
        let [before, after] = views;
        let source = self.kit.open_source(io, &overlay).map_err(at)?;
        let has_backing = parent.is_some() || !old.is_empty();
        let mut sink = self.kit.open_sink(io, &overlay, has_backing).map_err(at)?;
        let mut below = Ancestors::new(self.layers(io, old)?.into_iter().map(|(_, layer)| layer).collect());
        let mut differences = Differences::new(source, before, after);
        let length = Cell::new(overlay.file_length);
        let opener = |io: &mut dyn BlockIo| {
            let file_length = io.length(DEVICE_OUTPUT)?;
            self.kit.open_source(io, &DeviceConfig { file_length, ..overlay })
        };
        let content = Content { differences: &mut differences, sink: sink.as_mut(), below: &mut below };
        let mut images = Rebase { overlay: &opener, content: Some(content), parent };
        let done = rebase(
            io,
            &mut images,
            dry_run,
            &mut |plan| length.set(length.get().max(plan.sink.final_length)),
            &mut |_| {},
        )?;
        let longest = length.get().saturating_add(PARENT_ROOM);
        assert!(image(&io.files).len() as u64 <= longest, "the file is longer than the {longest} bytes planned");
        Ok(done.bytes)
    }

    /// What holds at every instant.
    fn instant(&self, files: &Files, expected: &[u8]) {
        assert!(self.read(files) == expected, "over {:?}, the image reads something else", self.named(files));
        for (device, bytes) in files.iter().filter(|(device, _)| **device != DEVICE_OUTPUT) {
            assert!(self.files[device] == *bytes, "device {device} is changed");
        }
        let snapshots = self.kit.snapshots(image(files));
        assert!(snapshots == self.kit.snapshots(image(&self.files)), "a snapshot reads something else");
        assert!(self.kit.is_dirty(image(files)) || self.kit.is_sound(image(files)), "the image is not sound");
    }

    fn finished(&self, files: &Files, expected: &[u8]) {
        self.instant(files, expected);
        assert_eq!(self.named(files), self.expected(), "what is recorded at the end");
        let identity = |files: &Files| {
            let mut io = MemoryDevices::new(files.clone());
            let opened = self.kit.open_source(&mut io, &self.device(files, DEVICE_OUTPUT));
            opened.ok().and_then(|source| source.identity())
        };
        assert_eq!(identity(files), identity(&self.files), "whoever is above the image does not know it any more");
    }

    /// A second run finishes it, whatever it finds. Returns what it changed.
    fn again(&self, files: Files, expected: &[u8]) -> Vec<Change> {
        let mut io = MemoryDevices::new(files);
        let done = self.run(&mut io, false);
        assert!(done.is_ok(), "a second rebase fails: {done:?}");
        self.finished(&io.files, expected);
        assert!(io.unflushed().is_empty(), "at the end, something is not flushed");
        io.log
    }
}

fn image(files: &Files) -> &[u8] {
    files.get(&DEVICE_OUTPUT).map(Vec::as_slice).unwrap_or_default()
}
