//! The commit of a pair of one format, as the tests of its driver put it on trial: done, dry, refused, without room, on devices
//! that keep their length, with requests that fail, and interrupted by a power loss at every instant.
//!
//! The SDK's `conformance` asks the same of any plugin, by content alone. Here a format adds what its own readers and other
//! programs look at: identities, counters, marks in the header, the space that may be lost.

use crate::pair::{self, Files};
use crate::{crashes, FormatKit, MIDDLE, OVERLAY};
use instar_guest_abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_commit::{CommitFailure, Options, Outcome};
use instar_guest_sdk::memory::MemoryDevices;
use std::collections::BTreeSet;

/// A bound that no file reaches.
const ANY_LENGTH: u64 = i64::MAX.cast_unsigned();
/// Bytes of heap that are too few for any sink.
const LITTLE_HEAP: usize = 8 << 20;

/// Damage to an image: what the refusal has to say, and what is done to the bytes.
pub type Damage<'a> = (&'a str, &'a dyn Fn(&mut Vec<u8>));

/// A commit before and after it was done without an interruption.
#[derive(Clone, Copy, Debug)]
pub struct Done<'a> {
    /// The images to begin with.
    pub before: &'a Files,
    /// What became of them.
    pub after: &'a Files,
}

/// A format on trial. All functions with a body panic if something does not hold.
pub trait Trial {
    /// The format.
    fn kit(&self) -> &dyn FormatKit;

    /// How images are committed.
    fn options(&self) -> Options {
        Options { resize_backing: true, ..Options::default() }
    }

    /// How many clusters an overlay holds, as a commit counts them.
    fn held(&self, overlay: &[u8]) -> u64;

    /// What holds of both images, besides their content, once a commit is finished, also one that was run again.
    fn assert_finished(&self, files: &Files);

    /// What else holds after a commit that was not interrupted.
    fn assert_done(&self, done: Done<'_>) {
        let _ = done;
    }

    /// What holds of both images at every instant of a power loss.
    fn assert_instant(&self, done: Done<'_>, now: &Files);

    /// What else holds after a commit that was interrupted and run again.
    fn assert_done_again(&self, done: Done<'_>, again: &Files) {
        let _ = (done, again);
    }

    /// Commit on these devices.
    ///
    /// # Errors
    /// As [`pair::run`].
    fn run(&self, io: &mut MemoryDevices, options: Options) -> Result<Outcome, CommitFailure> {
        pair::run(self.kit(), io, options, ANY_LENGTH)
    }

    /// A commit that has to succeed.
    fn committed(&self, files: Files, options: Options) -> MemoryDevices {
        let mut io = MemoryDevices::new(files);
        let result = self.run(&mut io, options);
        assert!(result.is_ok(), "{result:?}");
        io
    }

    /// Both images read as they should, and what [`Trial::assert_finished`] says.
    fn verify_finished(&self, files: &Files, (backing, overlay): &(Vec<u8>, Vec<u8>)) {
        let now = pair::views(self.kit(), files);
        assert!(now.0 == *backing, "the backing reads wrong");
        assert!(now.1 == *overlay, "the overlay reads wrong");
        self.assert_finished(files);
    }

    /// A commit from start to end.
    fn commit_and_verify(&self, before: &Files) -> MemoryDevices {
        let want = pair::expected(self.kit(), before);
        let held = self.held(&before[&OVERLAY]);
        let mut io = MemoryDevices::new(before.clone());
        let outcome = match self.run(&mut io, self.options()) {
            Ok(outcome) => outcome,
            Err(failure) => unreachable!("{:?}: {}", failure.step, failure.error),
        };
        assert_eq!((outcome.clusters_committed, outcome.overlay_clusters_cleared), (held, held));
        self.verify_finished(&io.files, &want);
        assert_eq!(io.unflushed(), BTreeSet::new());
        self.assert_done(Done { before, after: &io.files });
        io
    }

    /// A commit, and every state that a power loss can leave: the overlay reads the same, and running the commit again
    /// finishes it, also if that loses power, too. Returns how many states there were.
    fn verify_crashes(&self, before: &Files) -> usize {
        let want = pair::expected(self.kit(), before);
        let io = self.commit_and_verify(before);
        let done = Done { before, after: &io.files };
        let states = crashes().each_again(before, &io.log, &mut |files| {
            assert!(pair::views(self.kit(), &files).1 == want.1, "the overlay changed its content");
            self.assert_instant(done, &files);
            let again = self.committed(files, self.options());
            self.verify_finished(&again.files, &want);
            self.assert_done_again(done, &again.files);
            again.log
        });
        assert!(states > 1);
        println!("crash states: {states}");
        states
    }

    /// Each request fails once; the commit can be run again.
    fn verify_failing_requests(&self, before: &Files) {
        let want = pair::expected(self.kit(), before);
        let total = self.commit_and_verify(before).executed();
        for request in 0..total {
            let mut io = MemoryDevices::new(before.clone());
            io.fail_at = Some(request);
            let errno = self.run(&mut io, self.options()).map_err(|failure| failure.error.errno);
            assert!(errno == Err(5), "request {request}: {errno:?}");
            assert!(pair::views(self.kit(), &io.files).1 == want.1, "request {request}");
            let again = self.committed(io.files, self.options());
            self.verify_finished(&again.files, &want);
        }
    }

    /// A commit is refused with this code, for a reason that contains `why`, and changes nothing.
    fn verify_refused(&self, before: &Files, options: Options, code: ErrorCode, why: &str) {
        let mut io = MemoryDevices::new(before.clone());
        let result = self.run(&mut io, options);
        self.verify_refusal(result, &io, before, code, why);
    }

    /// A result is this refusal, and nothing has changed.
    fn verify_refusal(
        &self,
        result: Result<Outcome, CommitFailure>,
        io: &MemoryDevices,
        before: &Files,
        code: ErrorCode,
        why: &str,
    ) {
        let Err(CommitFailure { error, .. }) = result else { unreachable!("not refused, {why:?} was expected") };
        assert!(error.code == code && error.text.contains(why), "{:?}, not {code:?} {why:?}: {error}", error.code);
        assert!(io.log.is_empty() && io.files == *before, "{error}, and something has changed");
    }

    /// Each damage is found in overlay and backing, before anything changes.
    fn verify_damages(&self, good: &Files, damages: &[Damage<'_>]) {
        for (number, code) in [(OVERLAY, ErrorCode::OverlayCorrupt), (DEVICE_OUTPUT, ErrorCode::BackingCorrupt)] {
            for (why, damage) in damages {
                let mut damaged = good.clone();
                damaged.entry(number).and_modify(|bytes| damage(bytes));
                assert!(damaged != *good, "{why}: nothing is damaged");
                self.verify_refused(&damaged, Options::default(), code, why);
            }
        }
    }

    /// With room for `enough` bytes in the backing's file the commit is done, with a byte less it is refused, and so it is
    /// with too little memory.
    fn verify_room(&self, before: &Files, enough: usize) {
        let room = |length: usize| {
            let mut io = MemoryDevices::new(before.clone());
            (pair::run(self.kit(), &mut io, Options::default(), length as u64), io)
        };
        let (result, io) = room(enough);
        assert!(result.is_ok() && io.files[&DEVICE_OUTPUT].len() <= enough, "{result:?}");
        let (result, io) = room(enough - 1);
        self.verify_refusal(result, &io, before, ErrorCode::NoSpace, "");
        let mut io = MemoryDevices::new(before.clone());
        io.heap = Some(LITTLE_HEAP);
        let result = self.run(&mut io, Options::default());
        self.verify_refusal(result, &io, before, ErrorCode::ScratchTooSmall, "");
    }

    /// Commit on devices of these lengths, overlay and backing, which they keep. Behind the images there may be anything.
    /// Returns the images, unless there is too little room, which is found before anything changes.
    fn commit_on_devices(&self, files: &Files, lengths: [usize; 2]) -> Option<Files> {
        let want = pair::expected(self.kit(), files);
        let mut before = files.clone();
        for (number, length) in [OVERLAY, DEVICE_OUTPUT].into_iter().zip(lengths) {
            before.entry(number).and_modify(|bytes| bytes.resize(length, 0x99));
        }
        let mut io = MemoryDevices::new(before.clone());
        let result = pair::run_fixed(self.kit(), &mut io, Options::default());
        if result.is_err() {
            self.verify_refusal(result, &io, &before, ErrorCode::NoSpace, "");
            return None;
        }
        assert!(pair::views(self.kit(), &io.files) == want, "something reads wrong");
        assert_eq!([OVERLAY, DEVICE_OUTPUT].map(|number| io.files[&number].len()), lengths);
        Some(io.files)
    }

    /// A dry run changes nothing, and a commit that keeps the overlay all that it should. Returns the images after that.
    fn verify_dry_and_kept(&self, before: &Files) -> Files {
        // Several layers are never emptied.
        let keep_overlay = before.contains_key(&MIDDLE);
        let dry = self.committed(before.clone(), Options { dry_run: true, keep_overlay, ..self.options() });
        assert!(dry.log.is_empty() && dry.files == *before);
        let kept = self.committed(before.clone(), Options { keep_overlay: true, ..self.options() });
        assert!(pair::views(self.kit(), &kept.files) == pair::expected(self.kit(), before));
        kept.files
    }
}
