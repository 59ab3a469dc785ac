//! A pair of images, and what must hold before, during and after its commit.

use super::bitmaps::verify_bitmaps;
use super::builder::{build, Spec, State};
use super::checker::{check, content, snapshot_contents, Report, View};
use super::{be32, be64, run_commit_into, ANCESTOR, OVERLAY};
use instar_guest_commit::{CommitFailure, Options, Outcome};
use instar_guest_sdk::abi::{device_flags, DEVICE_OUTPUT};
use instar_guest_sdk::crash::Files;
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_testkit::{crash_states_drawn, crashes};
use std::collections::{BTreeMap, BTreeSet};

/// Two images, or three, and how they are committed.
pub struct Pair {
    /// The image that is committed.
    pub overlay: Vec<u8>,
    /// The image that it is committed into.
    pub backing: Vec<u8>,
    /// What the backing is backed by.
    pub ancestor: Option<Vec<u8>>,
    /// The backing may grow.
    pub resize: bool,
    /// The backing stands on a device that keeps its length.
    pub fixed: bool,
    /// What arrives in the backing is compressed.
    pub compress: bool,
}

impl Pair {
    /// A pair without an ancestor, whose backing may not grow.
    pub fn new(overlay: &Spec, backing: &Spec) -> Self {
        Self::of(build(overlay), build(backing))
    }

    /// The same of images that are built already.
    pub fn of(overlay: Vec<u8>, backing: Vec<u8>) -> Self {
        Self { overlay, backing, ancestor: None, resize: false, fixed: false, compress: false }
    }

    /// The images on devices that have recorded nothing yet.
    pub fn io(&self) -> MemoryDevices {
        let mut files = vec![(OVERLAY, self.overlay.clone()), (DEVICE_OUTPUT, self.backing.clone())];
        files.extend(self.ancestor.clone().map(|bytes| (ANCESTOR, bytes)));
        MemoryDevices::new(files)
    }

    /// Put the backing on a device of `length` bytes, whose other bytes are stale.
    pub fn on_device(mut self, length: usize) -> Self {
        assert!(self.backing.len() <= length, "the device is too small for the image: {}", self.backing.len());
        self.backing.resize(length, 0xee);
        self.fixed = true;
        self
    }

    /// Commit on these devices.
    ///
    /// # Errors
    /// As [`run_commit`](crate::run_commit).
    pub fn commit(&self, io: &mut MemoryDevices) -> Result<Outcome, CommitFailure> {
        let fixed = if self.fixed { device_flags::FIXED_LENGTH } else { 0 };
        let compress = if self.compress { device_flags::COMPRESS } else { 0 };
        run_commit_into(io, self.options(), fixed | compress)
    }

    /// What the commit is asked for.
    pub fn options(&self) -> Options {
        Options { resize_backing: self.resize, ..Options::default() }
    }
}

/// Guest-visible bytes of backing and overlay.
pub fn views(files: &BTreeMap<u32, Vec<u8>>) -> (Vec<u8>, Vec<u8>) {
    let below = files.get(&ANCESTOR).map(|bytes| content(bytes, None));
    let backing = content(&files[&DEVICE_OUTPUT], below.as_deref());
    let overlay = content(&files[&OVERLAY], Some(&backing));
    (backing, overlay)
}

/// What the snapshots of the backing read as, and those of the overlay without what is below it, which changes.
fn all_snapshots(files: &BTreeMap<u32, Vec<u8>>) -> Vec<Vec<u8>> {
    let below = files.get(&ANCESTOR).map(|bytes| content(bytes, None));
    let mut all = snapshot_contents(&files[&DEVICE_OUTPUT], below.as_deref());
    all.extend(snapshot_contents(&files[&OVERLAY], None));
    all
}

/// What the backing must read as afterwards: the overlay's view, and its own tail where it is longer.
pub fn expected(pair: &Pair) -> (Vec<u8>, Vec<u8>) {
    let (mut backing, overlay) = views(&pair.io().files);
    backing.resize(backing.len().max(overlay.len()), 0);
    backing[..overlay.len()].copy_from_slice(&overlay);
    (backing, overlay)
}

/// Which bytes the overlay holds, as far as its disk goes.
fn committed(pair: &Pair) -> Vec<bool> {
    let view = View::new(&pair.overlay);
    let mut bytes = vec![false; view.virtual_size as usize];
    for (cluster, ..) in view.entries() {
        let start = ((cluster << view.bits) as usize).min(bytes.len());
        let end = (start + view.size as usize).min(bytes.len());
        bytes[start..end].fill(true);
    }
    bytes
}

/// Bitmaps of the backing; returns whether enabled ones have exactly the bits that the commit calls for.
fn bitmaps_hold(pair: &Pair, files: &BTreeMap<u32, Vec<u8>>) -> bool {
    let (before, now) = (views(&pair.io().files).0, views(files).0);
    verify_bitmaps((&pair.backing, &files[&DEVICE_OUTPUT]), (&before, &now), &committed(pair), pair.resize)
}

/// Panics if the checker finds errors or leaks.
pub fn clean(bytes: &[u8]) {
    assert_eq!(check(bytes), Report::default());
}

/// Commit, and check content and consistency of both files.
pub fn commit_and_verify(pair: &Pair) -> MemoryDevices {
    let before_leaks = check(&pair.backing).leaks;
    let (backing, overlay) = expected(pair);
    let mut io = pair.io();
    let outcome = pair.commit(&mut io).unwrap();
    assert_eq!(outcome.clusters_committed, View::new(&pair.overlay).entries().len() as u64);
    assert_eq!(outcome.overlay_clusters_cleared, outcome.clusters_committed);
    let (backing_after, overlay_after) = views(&io.files);
    assert!(backing_after == backing, "the backing reads wrong");
    assert!(overlay_after == overlay, "the overlay reads wrong");
    assert!(all_snapshots(&io.files) == all_snapshots(&pair.io().files), "a snapshot reads wrong");
    assert!(bitmaps_hold(pair, &io.files), "an enabled bitmap says too much or too little");
    let report = check(&io.files[&DEVICE_OUTPUT]);
    assert_eq!(report, Report { errors: vec![], leaks: before_leaks });
    clean(&io.files[&OVERLAY]);
    assert!(View::new(&io.files[&OVERLAY]).entries().is_empty());
    assert!(io.files[&OVERLAY].len() <= pair.overlay.len(), "the overlay grew");
    assert_eq!(io.unflushed(), BTreeSet::new());
    assert_length_kept(pair, &io.files);
    io
}

fn assert_length_kept(pair: &Pair, files: &BTreeMap<u32, Vec<u8>>) {
    if pair.fixed {
        assert_eq!(files[&DEVICE_OUTPUT].len(), pair.backing.len(), "the device has another length");
    }
}

/// Every crash point: see [`Crashes`](instar_guest_sdk::crash::Crashes).
pub fn verify_crashes(pair: &Pair) {
    let (backing, overlay) = expected(pair);
    let mut io = pair.io();
    pair.commit(&mut io).unwrap();
    let before = pair.io().files;
    let snapshots = all_snapshots(&before);
    let mut verify = |files: Files| verify_reading(pair, &files, (&overlay, &backing, &snapshots));
    let states = crashes().each_again(&before, &io.log, &mut verify);
    // Before everything, and after it.
    assert!(states > 1, "only {states} states");
    println!("crash states: {states}");
}

/// Whether `make crash` runs the tests.
pub fn is_campaign() -> bool {
    crash_states_drawn().is_some()
}

/// What must hold of files that a power loss left, given what overlay and backing read as in the end: nothing is lost, and
/// running again finishes the job. Panics otherwise.
pub fn verify_state(pair: &Pair, files: &Files, overlay: &[u8], backing: &[u8]) {
    drop(verify_reading(pair, files, (overlay, backing, &all_snapshots(&pair.io().files))));
}

/// The same, if the snapshots were read before. Returns what running again has changed.
fn verify_reading(
    pair: &Pair,
    files: &Files,
    (overlay, backing, snapshots): (&[u8], &[u8], &[Vec<u8>]),
) -> Vec<Change> {
    assert_length_kept(pair, files);
    assert!(all_snapshots(files) == *snapshots, "a snapshot changed its content");
    let (_, overlay_now) = views(files);
    assert!(overlay_now == overlay, "the overlay changed its content");
    assert_eq!(errors(&files[&OVERLAY]), Vec::<String>::new(), "overlay");
    assert_eq!(errors(&files[&DEVICE_OUTPUT]), Vec::<String>::new(), "backing");
    for (before, now) in [(&pair.overlay, &files[&OVERLAY]), (&pair.backing, &files[&DEVICE_OUTPUT])] {
        assert!(
            unknown_autoclear(now) == 0 || now == before,
            "it was changed while an unknown feature is said to hold"
        );
    }
    bitmaps_hold(pair, files);
    // Running again finishes the job.
    let mut io = MemoryDevices::new(files.clone());
    pair.commit(&mut io).unwrap();
    let (backing_after, overlay_after) = views(&io.files);
    assert!(backing_after == backing && overlay_after == overlay, "running again gives something else");
    assert!(all_snapshots(&io.files) == *snapshots, "running again changes a snapshot");
    // What an overlay that is emptied in part has left is less than what was committed, but the bits stay.
    bitmaps_hold(pair, &io.files);
    assert_eq!(check(&io.files[&DEVICE_OUTPUT]).errors, Vec::<String>::new());
    assert_eq!(check(&io.files[&OVERLAY]).errors, Vec::<String>::new());
    assert!(!is_dirty(&io.files[&DEVICE_OUTPUT]) && !is_dirty(&io.files[&OVERLAY]), "running again leaves it dirty");
    io.log
}

/// Autoclear features other than that of bitmaps.
pub fn unknown_autoclear(bytes: &[u8]) -> u64 {
    if be32(bytes, 4) == 3 {
        be64(bytes, 88) & !1
    } else {
        0
    }
}

/// Whether the dirty bit is set.
pub fn is_dirty(bytes: &[u8]) -> bool {
    be32(bytes, 4) == 3 && be64(bytes, 72) & 1 != 0
}

/// What is wrong with an image that claims to have been closed cleanly.
fn errors(bytes: &[u8]) -> Vec<String> {
    if is_dirty(bytes) {
        Vec::new()
    } else {
        check(bytes).errors
    }
}

/// These guest clusters, full of data of one seed.
pub fn data(clusters: impl IntoIterator<Item = u64>, seed: u8) -> Vec<(u64, State)> {
    clusters.into_iter().map(|c| (c, State::Data(seed))).collect()
}
