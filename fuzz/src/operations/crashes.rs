//! Power losses: every commit of valid images, and of what inputs of the fuzz targets make of them, stopped at any change, with
//! any subset of what was not flushed. `tests/crashes.rs` runs this.
//!
//! What is asked of each state (`docs/commit.md`, "Power loss"): the overlay reads what it read, so do all snapshots; whatever
//! does not carry the dirty bit is consistent, to the tests' checker and to the driver's own; the plugins admit the images
//! again, and a second commit leaves what the first would have.

use super::bounded_devices::BoundedDevices;
use super::change::apply;
use super::commit::{admitted, guest, hold, snapshots};
use super::fixtures::Pairs;
use super::{config, open_source, quietly, sound, views, Files, Fixture, MIDDLE, OVERLAY};
use crate::formats::Format;
use crate::host;
use instar_guest_abi::{ErrorCode, FindingKind, DEVICE_OUTPUT};
use instar_guest_commit::{CommitFailure, Step};
use instar_guest_sdk::crash::Crashes;
use std::collections::BTreeMap;

/// The power losses of the commits of some pairs of formats.
pub struct PowerLosses<'a> {
    /// Whose commits.
    pub pairs: &'a Pairs,
    /// Which states.
    pub crashes: Crashes,
    /// Another checker, which is shown one in `every` of the images that must be consistent.
    pub checker: &'a Checker<'a>,
    /// See `checker`; not 0.
    pub every: usize,
    /// Images that were consistent.
    pub seen: usize,
}

/// Bytes of images for which one state more is left out after each that is looked at.
const STRIDE: usize = 2 << 20;

/// Looks at an image.
pub type Checker<'a> = dyn Fn(&Format, &[u8]) -> Result<(), Complaint> + 'a;

/// What the other checker says.
pub enum Complaint {
    /// It does not open the image.
    Refused(String),
    /// It finds corruptions.
    Corrupt(String),
}

/// What the images read as: by device, and the snapshots.
pub(super) type Reading = (Files, Vec<Vec<u8>>);

pub(super) fn read(fixture: &Fixture, files: &Files) -> Reading {
    (views(fixture, files), snapshots(fixture, files))
}

impl PowerLosses<'_> {
    /// Commit the images that an input of the fuzz target describes, and look at every state that a power loss can leave of
    /// it: how many there were. `None` if there is nothing to look at: the images make no sense, or nothing was changed.
    ///
    /// # Panics
    /// If a state is not what it must be.
    pub fn of(&mut self, input: &[u8]) -> Option<usize> {
        let fixture = self.pairs.choose(input)?;
        let files = apply(fixture, input);
        let configs = admitted(fixture, &files)?;
        let all_sound = files.iter().all(|(device, bytes)| sound(fixture.formats[device], bytes));
        let before = all_sound.then(|| quietly(|| read(fixture, &files)).ok()).flatten()?;
        let mut io = hold(fixture, files.clone(), &configs);
        let finished = guest(fixture, &mut io, &configs).is_ok();
        if io.devices.log.is_empty() {
            return None;
        }
        let after = finished.then(|| views(fixture, &io.devices.files)[&DEVICE_OUTPUT].clone());
        let arrived = after.as_ref().is_none_or(|after| after.starts_with(&before.0[&OVERLAY]));
        assert!(arrived, "the backing does not read what the overlay did");
        // All states of images of a MiB, and a sample of larger ones, such as VHDX: the drivers' own tests look at all.
        let stride = files.values().map(Vec::len).sum::<usize>() / STRIDE + 1;
        let mut number = 0;
        Some(self.crashes.each(&files, &io.devices.log, &mut |state| {
            number += 1;
            if number % stride != 0 {
                return;
            }
            verify(fixture, &state, &before);
            restored(fixture, &state, &files, &before);
            self.ask(fixture, &state, &files);
            again(fixture, state, &files, &before, after.as_deref());
        }))
    }

    /// Neither `instar check` nor the other checker has a complaint, unless it had one about the image that the fuzzer made.
    fn ask(&mut self, fixture: &Fixture, files: &Files, originals: &Files) {
        for device in [OVERLAY, DEVICE_OUTPUT] {
            let (format, bytes, original) = (fixture.formats[&device], &files[&device], &originals[&device]);
            // Two formats have a mark of an image that was not closed, which is a finding. Whatever else a crash leaves is none.
            let dirty = format.kit.is_dirty(bytes);
            if !format.kit.has_metadata() || (dirty && matches!(format.name, "qcow2" | "parallels")) {
                continue;
            }
            let corruptions = examine(device, format, bytes);
            assert!(
                corruptions.is_empty() || was_corrupt(device, format, original),
                "device {device}: {corruptions:?}"
            );
            if dirty {
                continue;
            }
            self.seen += 1;
            if !self.seen.is_multiple_of(self.every) {
                continue;
            }
            if let Err(Complaint::Refused(text) | Complaint::Corrupt(text)) = (self.checker)(format, bytes) {
                let excused = match (self.checker)(format, original) {
                    Ok(()) => false,
                    Err(Complaint::Refused(_)) => true,
                    Err(Complaint::Corrupt(_)) => {
                        was_corrupt(device, format, original) || !format.kit.is_dirty(original)
                    }
                };
                assert!(excused, "device {device}: {text}");
            }
        }
    }
}

/// The states that commits of these images leave if they fail, each at another of this many requests, spread over all.
#[must_use]
pub fn interrupted_commits(fixture: &Fixture, count: usize) -> Vec<Files> {
    let Some(configs) = admitted(fixture, &fixture.files) else { return Vec::new() };
    let interrupted = |request: Option<usize>| {
        let mut io = hold(fixture, fixture.files.clone(), &configs);
        io.devices.fail_at = request;
        // Whether it fails is no matter: giving space back may, for one.
        let _ = guest(fixture, &mut io, &configs);
        io.devices
    };
    let requests = interrupted(None).executed();
    let mut left: Vec<Files> = (1..=count).map(|part| interrupted(Some(requests * part / (count + 1))).files).collect();
    left.retain(|files| *files != fixture.files);
    left.dedup();
    left
}

/// What holds at every instant.
pub(super) fn verify(fixture: &Fixture, files: &Files, (old, old_snapshots): &Reading) {
    let (now, snapshots) = read(fixture, files);
    assert!(now[&OVERLAY] == old[&OVERLAY], "the overlay reads something else");
    assert!(snapshots == *old_snapshots, "a snapshot reads something else");
    for device in [OVERLAY, DEVICE_OUTPUT] {
        let (format, bytes) = (fixture.formats[&device], &files[&device]);
        assert!(sound(format, bytes), "device {device} is not consistent");
    }
}

/// The backing of before the commit, as a backup has it, goes with what is above it now only if that still holds everything.
pub(super) fn restored(fixture: &Fixture, state: &Files, originals: &Files, (old, _): &Reading) {
    let lowest = if fixture.files.contains_key(&MIDDLE) { MIDDLE } else { OVERLAY };
    let look = |device: u32| host::look(fixture.formats[&device], &originals[&device]).expect("was admitted");
    let (child, parent) = (look(lowest), look(DEVICE_OUTPUT));
    if !child.follows(&(fixture.formats[&DEVICE_OUTPUT].next_identity)(&parent, &child)) {
        return;
    }
    let mut files = state.clone();
    files.insert(DEVICE_OUTPUT, originals[&DEVICE_OUTPUT].clone());
    if admitted(fixture, &files).is_some() {
        assert!(views(fixture, &files)[&OVERLAY] == old[&OVERLAY], "a restored backing is taken for the right one");
    }
}

/// A second commit finishes the job; of one that had failed it may fail again, and breaks nothing.
pub(super) fn again(
    fixture: &Fixture,
    files: Files,
    originals: &Files,
    (old, old_snapshots): &Reading,
    after: Option<&[u8]>,
) {
    let configs = admitted(fixture, &files).expect("the plugins refuse what a power loss left");
    let mut io = hold(fixture, files, &configs);
    let result = guest(fixture, &mut io, &configs);
    let (now, snapshots) = read(fixture, &io.devices.files);
    assert!(now[&OVERLAY] == old[&OVERLAY], "the overlay reads something else after a second commit");
    assert!(snapshots == *old_snapshots, "a snapshot reads something else after a second commit");
    for device in [OVERLAY, DEVICE_OUTPUT] {
        assert!(
            sound(fixture.formats[&device], &io.devices.files[&device]),
            "device {device} is broken by a second commit"
        );
    }
    let Some(after) = after else { return };
    if let Err(CommitFailure { step, error }) = result {
        // Leaks are told from lost data by a walk over all tables, which stops at an entry that was corrupt before, and
        // that the first commit did not need.
        let corrupt = was_corrupt(DEVICE_OUTPUT, fixture.formats[&DEVICE_OUTPUT], &originals[&DEVICE_OUTPUT]);
        let refused = matches!(step, Step::Check | Step::Plan) && error.code == ErrorCode::BackingCorrupt;
        assert!(refused && corrupt, "a second commit fails: {error}");
        return;
    }
    assert!(now[&DEVICE_OUTPUT] == after, "a second commit makes something else");
    let emptied = (!fixture.keeps_overlay()).then_some(OVERLAY);
    for device in emptied.into_iter().chain([DEVICE_OUTPUT]) {
        let bytes = &io.devices.files[&device];
        let is_clean = *bytes == originals[&device] || !fixture.formats[&device].kit.is_dirty(bytes);
        assert!(is_clean, "device {device} is still dirty");
    }
}

/// Whether `instar check` finds corruptions in an image besides what a commit repairs if it was not closed cleanly.
fn was_corrupt(device: u32, format: &Format, bytes: &[u8]) -> bool {
    let repaired = |text: &String| format.kit.is_dirty(bytes) && (text.contains("refcount") || text.contains("COPIED"));
    !examine(device, format, bytes).iter().all(repaired)
}

/// What `instar check` finds corrupt in an image.
pub(super) fn examine(device: u32, format: &Format, bytes: &[u8]) -> Vec<String> {
    let facts = host::look(format, bytes).expect("the plugin does not know its image any more");
    let mut io = BoundedDevices::look(BTreeMap::from([(device, bytes.to_vec())]));
    let mut corruptions = Vec::new();
    let examined = open_source(format, &mut io, &config(device, &facts, false, 0)).and_then(|mut source| {
        source.check(&mut io, &mut |kind, text| {
            if kind == FindingKind::Corruption {
                corruptions.push(text.to_owned());
            }
        })
    });
    corruptions.extend(examined.err().map(|error| error.to_string()));
    corruptions
}
