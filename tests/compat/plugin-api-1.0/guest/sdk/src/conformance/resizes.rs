//! What holds of an image that gets another size: when it does, when it is refused, when a request fails, and at every instant
//! of a power loss.

use super::fixture::{device, Below, ANCESTOR, ANY_LENGTH};
use super::kit::{Builder, ImageKit};
use super::layer::{Layer, SECTOR};
use super::Report;
use crate::crash::{Crashes, Files};
use crate::memory::{Change, MemoryDevices};
use crate::random::Random;
use crate::resize::{resize, Event, Options, ResizeFailure, Step};
use crate::ReadBelow;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_abi::{DeviceRole, ErrorCode, DEVICE_OUTPUT};

/// Number of requests that fail, one in each resize, out of all that a resize makes.
const FAILURES: usize = 100;

/// An image, [`DEVICE_OUTPUT`], and what is below it, [`ANCESTOR`], if it has a backing.
struct Resized<'a> {
    kit: &'a dyn ImageKit,
    files: &'a Files,
    size: u64,
    before: Vec<u8>,
    /// What it reads as when it has its new size.
    after: Vec<u8>,
    snapshots: Vec<Vec<u8>>,
}

/// Give an image the virtual size `size` in bytes, and verify all that is promised. The image is [`DEVICE_OUTPUT`], and what it
/// is backed by is [`ANCESTOR`], both of this format. Returns what was looked at, and the image at the end, unless the resize
/// is refused.
///
/// # Panics
/// If a promise is broken.
pub fn verify_resize(kit: &dyn ImageKit, files: &Files, size: u64, crashes: Crashes) -> (Report, Option<Files>) {
    let before = content(kit, files);
    let mut resized = Resized { kit, files, size, before, after: Vec::new(), snapshots: kit.snapshots(image(files)) };
    let mut io = MemoryDevices::new(files.clone());
    let (mut dry, mut longest) = (false, 0);
    for dry_run in [true, false] {
        let done = resized.run(&mut io, dry_run, ANY_LENGTH, &mut longest);
        match done {
            Err(failure) => {
                assert!(failure.step == Step::Plan && !dry, "{failure:?}");
                assert!(failure.error.code == ErrorCode::UnsupportedFormat, "a valid image is refused: {failure:?}");
                assert!(io.log.is_empty(), "a refused resize has changed something: {:?}", io.log);
                return (Report { refused: 1, ..Report::default() }, None);
            }
            Ok(new) if dry_run => {
                assert!(io.log.is_empty(), "a dry run has changed something: {:?}", io.log);
                assert!(new >= size, "{new} bytes are fewer than the {size} that were asked for");
                resized.after = resized.before.clone();
                resized.after.truncate(length(size));
                resized.after.resize(length(new), 0);
                dry = true;
            }
            Ok(_) => {}
        }
    }
    let unflushed = io.unflushed();
    assert!(unflushed.is_empty(), "at the end, devices {unflushed:?} are not flushed");
    let bound = longest.max(image(files).len() as u64);
    assert!(image(&io.files).len() as u64 <= bound, "the file is longer than the {bound} bytes that were planned");
    resized.finished(&io.files);
    resized.failing_requests(io.executed());
    let states = crashes.each_again(files, &io.log, &mut |files| {
        resized.instant(&files);
        resized.again(files)
    });
    (Report { committed: 1, states, ..Report::default() }, Some(io.files))
}

/// [`verify_resize`] with images that are drawn, other ones for each number: each shrinks and grows again, or grows and shrinks,
/// to sizes that end anywhere within a cluster.
///
/// # Panics
/// If a promise is broken, or if every resize is refused.
pub fn verify_resizes(kit: &dyn Builder, numbers: Range<u64>, crashes: Crashes) -> Report {
    let mut report = Report::default();
    for number in numbers {
        let random = &mut Random::seeded(number);
        let cluster = kit.cluster();
        let size = |random: &mut Random| {
            let sectors = (cluster / SECTOR).max(1);
            random.below(12_u64.saturating_mul(sectors)).saturating_add(1).saturating_mul(SECTOR)
        };
        let mut files = Files::new();
        let below = random.coin();
        let length = size(random);
        let own = Layer::drawn(random, (length, cluster), kit.states(), below);
        files.insert(DEVICE_OUTPUT, kit.build(&own));
        if below {
            let length = size(random);
            let other = Layer::drawn(random, (length, cluster), kit.states(), false);
            files.insert(ANCESTOR, kit.build(&other));
        }
        for turn in 0..3 {
            let wanted = size(random);
            let (seen, left) = verify_resize(kit, &files, wanted, Crashes { seed: number * 3 + turn, ..crashes });
            report += seen;
            files = left.unwrap_or(files);
        }
    }
    assert!(report.committed > 0, "every resize is refused: {report:?}");
    report
}

fn image(files: &Files) -> &[u8] {
    files.get(&DEVICE_OUTPUT).map(Vec::as_slice).unwrap_or_default()
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn ancestor(kit: &dyn ImageKit, files: &Files) -> Option<Vec<u8>> {
    files.get(&ANCESTOR).map(|bytes| kit.content(bytes, None))
}

fn content(kit: &dyn ImageKit, files: &Files) -> Vec<u8> {
    kit.content(image(files), ancestor(kit, files).as_deref())
}

impl Resized<'_> {
    /// Resize on these devices, held to the host's rules.
    fn run(&self, io: &mut MemoryDevices, dry_run: bool, most: u64, longest: &mut u64) -> Result<u64, ResizeFailure> {
        let at = |error| ResizeFailure { step: Step::Plan, error };
        let target = device(self.kit, DEVICE_OUTPUT, image(&io.files), most);
        let mut below = Below(ancestor(self.kit, &io.files));
        io.hold([(DeviceRole::Target, &target)]);
        let mut sink = self.kit.open_sink(io, &target, below.exists()).map_err(at)?;
        let options = Options { virtual_size: self.size, preallocate: false, dry_run };
        resize(io, sink.as_mut(), &mut below, options, &mut |event| {
            if let Event::Planned { plan, .. } = event {
                *longest = plan.final_length;
            }
        })
    }

    /// Let one request after the other fail.
    fn failing_requests(&self, requests: usize) {
        for request in (0..requests).step_by((requests / FAILURES).max(1)) {
            let mut io = MemoryDevices::new(self.files.clone());
            io.fail_at = Some(request);
            match self.run(&mut io, false, ANY_LENGTH, &mut 0) {
                Err(ResizeFailure { step: Step::Plan, .. }) => {
                    assert!(io.log.is_empty(), "changed before request {request} failed, while planning");
                }
                Ok(_) => self.finished(&io.files),
                Err(_) => self.instant(&io.files),
            }
            self.again(io.files);
        }
    }

    /// What holds at every instant: the old size and the old content, or the new ones.
    fn instant(&self, files: &Files) {
        let now = content(self.kit, files);
        assert!(now == self.before || now == self.after, "the image reads neither as before nor as afterwards");
        assert!(self.kit.snapshots(image(files)) == self.snapshots, "a snapshot reads something else");
        let dirty = self.kit.is_dirty(image(files));
        assert!(dirty || self.kit.is_sound(image(files)), "the image is not sound");
    }

    fn finished(&self, files: &Files) {
        self.instant(files);
        assert!(content(self.kit, files) == self.after, "the image reads something else afterwards");
    }

    /// A second run finishes what was interrupted; and whatever the first one left past the end, an image that grows reads
    /// zeroes there. Returns what the second run changed.
    fn again(&self, files: Files) -> Vec<Change> {
        let mut io = MemoryDevices::new(files);
        let done = self.run(&mut io, false, ANY_LENGTH, &mut 0);
        assert!(done.is_ok(), "a second resize fails: {done:?}");
        self.finished(&io.files);
        let changes = io.log.clone();
        if self.after.len() < self.before.len() && self.kit.can_grow() {
            let old = Self {
                size: self.before.len() as u64,
                after: Vec::new(),
                before: Vec::new(),
                snapshots: Vec::new(),
                ..*self
            };
            let done = old.run(&mut io, false, ANY_LENGTH, &mut 0);
            assert!(done.is_ok(), "an image that was shrunk does not grow: {done:?}");
            let mut grown = self.after.clone();
            grown.resize(self.before.len(), 0);
            let now = content(self.kit, &io.files);
            assert!(now.get(..grown.len()) == Some(&grown), "what was cut off comes back");
        }
        changes
    }
}
