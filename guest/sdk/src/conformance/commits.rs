//! What holds of a commit: when it is done, when it is refused, when a request fails, and at every instant of a power loss.

use super::fixture::{Fixture, Reading, ANY_LENGTH};
use super::promises;
use super::Report;
use crate::commit::{CommitFailure, Options, Plan, Step};
use crate::crash::{Crashes, Files};
use crate::memory::{Change, MemoryDevices};
use crate::random::Random;
use alloc::vec::Vec;
use instar_guest_abi::DEVICE_OUTPUT;

/// Number of requests that fail, one in each commit, out of all that a commit makes.
const FAILURES: usize = 150;

/// A fixture, and what its images read as before the commit and after it.
struct Verified<'a> {
    fixture: &'a Fixture<'a>,
    before: Reading,
    after: Reading,
}

/// Run the commits of a fixture.
///
/// # Panics
/// If something does not hold.
pub(super) fn verify(fixture: &Fixture<'_>, crashes: Crashes) -> Report {
    let verified = Verified::new(fixture);
    let Some(plan) = verified.dry_run() else {
        return Report { refused: 1, ..Report::default() };
    };
    let whole = verified.whole(plan.sink.final_length);
    verified.kept();
    verified.failing_requests(whole.executed());
    let states = crashes.each_again(&fixture.files, &whole.log, &mut |files| {
        verified.instant(&files);
        verified.again(files)
    });
    Report { committed: 1, states, ..Report::default() }
}

/// Run the one commit of a fixture whose overlay can only be read.
///
/// # Panics
/// If something does not hold.
pub(super) fn verify_kept(fixture: &Fixture<'_>) -> Report {
    Verified::new(fixture).kept();
    Report { committed: 1, ..Report::default() }
}

/// Whether a commit that failed here has changed nothing.
fn is_refusal(failure: &CommitFailure) -> bool {
    matches!(failure.step, Step::Check | Step::Plan)
}

impl<'a> Verified<'a> {
    /// Read a fixture, and compute what its images read as after a commit.
    fn new(fixture: &'a Fixture<'a>) -> Self {
        let before = fixture.read(&fixture.files);
        for (kit, image) in fixture.images(&fixture.files) {
            assert!(kit.is_dirty(image) || kit.is_sound(image), "an image to begin with is not sound");
        }
        let mut after = before.clone();
        let (seen, size) = (before.overlay.len(), before.backing.len());
        if fixture.grows() {
            after.backing.resize(seen, 0);
        }
        let shared = seen.min(after.backing.len());
        after.backing[..shared].copy_from_slice(&before.overlay[..shared]);
        assert!(after.backing.len() >= size);
        Self { fixture, before, after }
    }

    fn devices(&self, files: &Files) -> MemoryDevices {
        MemoryDevices::new(files.clone())
    }

    /// Neither a dry run nor a refusal changes anything; `None` for a refusal.
    fn dry_run(&self) -> Option<Plan> {
        for dry_run in [true, false] {
            let (mut io, mut plan) = (self.devices(&self.fixture.files), None);
            match self.fixture.commit(&mut io, Options { dry_run, ..Options::default() }, ANY_LENGTH, &mut plan) {
                Ok(_) if dry_run => {
                    assert!(io.log.is_empty(), "a dry run has changed something: {:?}", io.log);
                    return plan;
                }
                Ok(_) => unreachable!("a dry run is refused, and the commit is not"),
                Err(failure) => {
                    assert!(is_refusal(&failure), "{:?} fails: {}", failure.step, failure.error);
                    assert!(io.log.is_empty(), "a refused commit has changed something: {:?}", io.log);
                }
            }
        }
        None
    }

    /// A commit from start to end, into a file that may become as long as the plan says.
    fn whole(&self, longest: u64) -> MemoryDevices {
        let mut io = self.devices(&self.fixture.files);
        let result = self.fixture.commit(&mut io, Options::default(), longest, &mut None);
        let Ok(outcome) = result else { unreachable!("what was planned fails: {result:?}") };
        assert!(
            outcome.overlay_clusters_cleared == outcome.clusters_committed,
            "not all clusters were dropped: {outcome:?}"
        );
        self.finished(&io.files);
        let unflushed = io.unflushed();
        assert!(unflushed.is_empty(), "at the end, devices {unflushed:?} are not flushed");
        let [_, (_, backing)] = self.fixture.images(&io.files);
        assert!(backing.len() as u64 <= longest.max(self.fixture.files[&DEVICE_OUTPUT].len() as u64));
        io
    }

    /// With the overlay kept, both read as after a commit.
    fn kept(&self) {
        let mut io = self.devices(&self.fixture.files);
        let options = Options { keep_overlay: true, ..Options::default() };
        let result = self.fixture.commit(&mut io, options, ANY_LENGTH, &mut None);
        assert!(result.is_ok(), "an overlay that is kept: {result:?}");
        self.reads(&io.files);
    }

    /// Let one request after the other fail.
    fn failing_requests(&self, requests: usize) {
        for request in (0..requests).step_by((requests / FAILURES).max(1)) {
            let mut io = self.devices(&self.fixture.files);
            io.fail_at = Some(request);
            match self.fixture.commit(&mut io, Options::default(), ANY_LENGTH, &mut None) {
                Err(failure) if is_refusal(&failure) => {
                    assert!(io.log.is_empty(), "changed before request {request} failed, in {:?}", failure.step);
                }
                // Giving space back may fail, for one.
                Ok(_) => self.finished(&io.files),
                Err(_) => self.instant(&io.files),
            }
            self.again(io.files);
        }
    }

    /// What holds of the images at every instant.
    fn instant(&self, files: &Files) {
        let now = self.fixture.read(files);
        assert!(now.overlay == self.before.overlay, "the overlay reads something else");
        assert!(now.snapshots == self.before.snapshots, "a snapshot reads something else");
        for (kit, image) in self.fixture.images(files) {
            assert!(kit.is_dirty(image) || kit.is_sound(image), "an image is not sound");
        }
    }

    /// Both images read as after the commit.
    fn reads(&self, files: &Files) {
        self.instant(files);
        assert!(self.fixture.read(files).backing == self.after.backing, "the backing reads something else");
    }

    /// The same, and the overlay holds nothing any more.
    fn finished(&self, files: &Files) {
        self.reads(files);
        let [(kit, overlay), _] = self.fixture.images(files);
        let nothing = kit.content(overlay, None);
        assert!(nothing.iter().all(|&byte| byte == 0), "the overlay holds data after it was emptied");
        let all = alloc::vec![0xa5; nothing.len()];
        assert!(kit.content(overlay, Some(&all)) == all, "the overlay holds something after it was emptied");
    }

    /// A second commit finishes the job, whatever it finds; the images keep their promises then. Returns what it changed.
    fn again(&self, files: Files) -> Vec<Change> {
        let mut io = self.devices(&files);
        let result = self.fixture.commit(&mut io, Options::default(), ANY_LENGTH, &mut None);
        assert!(result.is_ok(), "a second commit fails: {result:?}");
        self.finished(&io.files);
        io.log
    }
}

/// Verify what the sources of a fixture promise, where images can be opened as sources.
pub(super) fn sources(fixture: &Fixture<'_>, random: &mut Random) {
    for (kit, image) in fixture.images(&fixture.files) {
        if kit.has_source() {
            promises::verify(kit, image, random);
        }
    }
}
