//! Two VDI images, or three that are committed at once: [`instar_testkit::pair`] of this format.

use super::{build, Kit, Spec, View};
use instar_guest_commit::{CommitFailure, Options, Outcome};
use instar_guest_sdk::memory::MemoryDevices;
use instar_testkit::pair;
pub use instar_testkit::pair::Files;
pub use instar_testkit::{ANCESTOR, MIDDLE, OVERLAY};

/// The images of a commit, built.
pub fn files(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) -> Files {
    pair::built(build, overlay, backing, ancestor)
}

/// As [`pair::run`].
///
/// # Errors
/// As there.
pub fn run(io: &mut MemoryDevices, options: Options, max_length: u64) -> Result<Outcome, CommitFailure> {
    pair::run(&Kit, io, options, max_length)
}

/// As [`pair::views`].
pub fn views(files: &Files) -> (Vec<u8>, Vec<u8>) {
    pair::views(&Kit, files)
}

/// The image whose parent is the backing.
pub fn lowest(files: &Files) -> View<'_> {
    View::new(pair::lowest(files))
}

/// As [`pair::assert_goes_with_none_but`].
pub fn assert_goes_with_none_but(now: &Files, before: &Files, overlay: &[u8]) {
    pair::assert_goes_with_none_but(&Kit, now, before, overlay);
}
