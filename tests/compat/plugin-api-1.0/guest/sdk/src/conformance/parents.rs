//! What a driver promises of an image that gets another parent: when that is done, when it is refused, when a request fails,
//! and at every instant of a power loss.

use super::fixture::{device, OVERLAY};
use super::kit::{ParentKit, Recorded};
use crate::crash::{Crashes, Files};
use crate::memory::{self, MemoryDevices};
use crate::{BlockIo, DriverError, DriverResult, Parent, Source};
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_abi::{DeviceConfig, ErrorCode, FindingKind, Part, Phase, PARENT_ROOM};

/// What was looked at: a test may ask for more than nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Relinks {
    /// Images that got another parent.
    pub changed: usize,
    /// Parents that were refused.
    pub refused: usize,
    /// States that a power loss can leave.
    pub states: usize,
}

impl core::ops::AddAssign for Relinks {
    fn add_assign(&mut self, other: Self) {
        self.changed += other.changed;
        self.refused += other.refused;
        self.states += other.states;
    }
}

/// Give an image one of these parents after the other, then none, and the first one again.
///
/// # Panics
/// If a promise is broken.
pub fn verify_parents(
    kit: &dyn ParentKit,
    image: &[u8],
    parents: &[Parent<'_>],
    crashes: Crashes,
) -> (Relinks, Vec<u8>) {
    let (mut report, mut image) = (Relinks::default(), image.to_vec());
    let steps = parents.iter().map(Some).chain([None]).chain(parents.first().map(Some));
    for parent in steps {
        match verify_parent(kit, &image, parent, crashes) {
            Ok((states, changed)) => {
                report += Relinks { changed: 1, states, ..Relinks::default() };
                image = changed;
            }
            Err(_) => report.refused += 1,
        }
    }
    (report, image)
}

/// Give an image another parent, or none. Returns how many states a power loss can leave, and the image.
///
/// # Errors
/// The refusal, which has changed nothing.
///
/// # Panics
/// If a promise is broken.
pub fn verify_parent(
    kit: &dyn ParentKit,
    image: &[u8],
    parent: Option<&Parent<'_>>,
    crashes: Crashes,
) -> DriverResult<(usize, Vec<u8>)> {
    let before = Seen::of(kit, image);
    let expected = parent.map(|parent| kit.expected(parent));
    let change = Change { kit, parent, image, before, expected };
    let mut io = change.devices(image);
    if let Err(refusal) = change.plan(&mut io) {
        assert!(io.log.is_empty(), "a refused parent has changed something: {:?}", io.log);
        let code = refusal.code;
        let known = [ErrorCode::UnsupportedFormat, ErrorCode::NotImplemented, ErrorCode::OverlayCorrupt];
        assert!(known.contains(&code), "a refusal of another kind: {refusal}");
        return Err(refusal);
    }
    assert!(io.log.is_empty(), "planning has changed something: {:?}", io.log);

    let mut io = change.devices(image);
    let done = change.run(&mut io);
    assert!(done.is_ok(), "what was planned fails: {done:?}");
    change.finished(&io.files);
    let unflushed = io.unflushed();
    assert!(unflushed.is_empty(), "at the end, devices {unflushed:?} are not flushed");

    for request in 0..io.executed() {
        let mut failing = change.devices(image);
        failing.fail_at = Some(request);
        match change.run(&mut failing) {
            Err(Failed::Plan(_)) => {
                assert!(failing.log.is_empty(), "changed before request {request} failed: {:?}", failing.log);
            }
            // Giving space back may fail, for one.
            Ok(()) => change.finished(&failing.files),
            Err(Failed::Change(_)) => change.instant(&failing.files),
        }
        change.again(&failing.files);
    }
    let files = Files::from([(OVERLAY, image.to_vec())]);
    let states = crashes.each_again(&files, &io.log, &mut |files| {
        change.instant(&files);
        change.again(&files)
    });
    Ok((states, own(&io.files).to_vec()))
}

/// Parents that no caller should ask for, or that few formats can name: each is refused, or recorded as it is. Returns how many
/// are refused.
///
/// # Panics
/// If a promise is broken.
pub fn verify_odd_parents(kit: &dyn ParentKit, image: &[u8], usual: &Parent<'_>, crashes: Crashes) -> usize {
    let (long, format) = (vec![b'n'; 1 << 20], "f".repeat(4096));
    let odd = [
        Parent { name: &long[..1 << 10], ..*usual },
        Parent { name: &long[..1 << 16], ..*usual },
        Parent { name: &long, ..*usual },
        Parent { name: b"", ..*usual },
        Parent { name: b"in\0two", ..*usual },
        Parent { name: b"\xff\xfe \n'\"\\\x1b[2J", ..*usual },
        Parent { name: "gr\u{fc}n/\u{1f4be}".as_bytes(), ..*usual },
        Parent { format: "", ..*usual },
        Parent { format: &format, ..*usual },
        Parent { identity: None, ..*usual },
        Parent { virtual_size: 0, ..*usual },
        Parent { virtual_size: u64::MAX, ..*usual },
    ];
    odd.iter().filter(|parent| verify_parent(kit, image, Some(parent), crashes).is_err()).count()
}

/// What an image reads as, and what is wrong with it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    parent: Option<Recorded>,
    content: Vec<u8>,
    snapshots: Vec<Vec<u8>>,
    sound: bool,
    corruptions: usize,
    leaks: usize,
}

impl Seen {
    fn of(kit: &dyn ParentKit, image: &[u8]) -> Self {
        let size = kit.info(image).virtual_size;
        let below: Vec<u8> = (0..size).map(|at| (at / 512).to_le_bytes()[0] | 1).collect();
        let (mut corruptions, mut leaks) = (0, 0);
        let mut io = MemoryDevices::new([(OVERLAY, image.to_vec())]);
        let opened = kit.open_source(&mut io, &child(kit, image));
        let examined = opened.and_then(|mut source| {
            source.check(&mut io, &mut |kind, _| match kind {
                FindingKind::Corruption => corruptions += 1,
                FindingKind::Leak => leaks += 1,
            })
        });
        if let Err(error) = examined {
            assert!(error.code == ErrorCode::NotImplemented, "the image is not examined: {error}");
        }
        Self {
            parent: kit.recorded(image),
            content: kit.content(image, Some(&below)),
            snapshots: kit.snapshots(image),
            sound: kit.is_sound(image),
            corruptions,
            leaks,
        }
    }
}

/// What the host tells the guest of an image that gets another parent.
fn child(kit: &dyn ParentKit, image: &[u8]) -> DeviceConfig {
    device(kit, OVERLAY, image, (image.len() as u64).saturating_add(PARENT_ROOM))
}

fn own(files: &Files) -> &[u8] {
    files.get(&OVERLAY).map(Vec::as_slice).unwrap_or_default()
}

/// Where it failed.
#[derive(Debug)]
enum Failed {
    Plan(#[allow(dead_code, reason = "for the message of a test that fails")] DriverError),
    Change(#[allow(dead_code, reason = "for the message of a test that fails")] DriverError),
}

/// An image and the parent that it is to get.
struct Change<'a> {
    kit: &'a dyn ParentKit,
    parent: Option<&'a Parent<'a>>,
    image: &'a [u8],
    before: Seen,
    expected: Option<Recorded>,
}

impl Change<'_> {
    fn devices(&self, image: &[u8]) -> MemoryDevices {
        let mut io = MemoryDevices::new([(OVERLAY, image.to_vec())]);
        // An image of before the change may become so long, whatever a power loss has left of it.
        let longest = (self.image.len() as u64).saturating_add(PARENT_ROOM).max(image.len() as u64);
        io.hold([(Part::Child, &DeviceConfig { max_length: longest, ..child(self.kit, image) })]);
        io
    }

    fn plan(&self, io: &mut MemoryDevices) -> DriverResult<Box<dyn Source>> {
        let device = child(self.kit, own(&io.files));
        let mut source = self.kit.open_source(io, &device)?;
        source.plan_parent(io, self.parent)?;
        Ok(source)
    }

    fn run(&self, io: &mut MemoryDevices) -> Result<(), Failed> {
        let mut source = self.plan(io).map_err(Failed::Plan)?;
        io.enter(Phase::Target);
        io.enter(Phase::Children);
        source.set_parent(io).map_err(Failed::Change)
    }

    /// What holds of the image at every instant.
    fn instant(&self, files: &Files) {
        let (now, before) = (Seen::of(self.kit, own(files)), &self.before);
        let whole = now.parent == before.parent || now.parent == self.expected;
        assert!(whole, "the image names {:?}, neither {:?} nor {:?}, whole", now.parent, before.parent, self.expected);
        assert!(now.content == before.content, "the image reads something else");
        assert!(now.snapshots == before.snapshots, "a snapshot reads something else");
        assert!(now.sound || !before.sound, "the image is not sound");
        let (worse, found) = ((before.corruptions, before.leaks), (now.corruptions, now.leaks));
        let excused = (found.0 <= worse.0 && found.1 <= worse.1) || self.kit.is_dirty(own(files));
        assert!(excused, "corruptions and leaks: {found:?}, before {worse:?}");
    }

    fn finished(&self, files: &Files) {
        self.instant(files);
        let named = self.kit.recorded(own(files));
        assert!(named == self.expected, "the image names {named:?} instead of {:?}", self.expected);
    }

    /// A second run finishes it, whatever it finds.
    fn again(&self, files: &Files) -> Vec<memory::Change> {
        let mut io = self.devices(own(files));
        let result = self.run(&mut io);
        assert!(result.is_ok(), "a second run fails: {result:?}");
        self.finished(&io.files);
        io.log
    }
}
