//! Commits between images of every pair of formats.

use super::bounded_devices::BoundedDevices;
use super::change::apply;
use super::fixtures::Pairs;
use super::sandboxed;
use super::{config, open_sink, open_source, quietly, sound, views, Files, Fixture};
use super::{ANCESTOR, MIDDLE, OVERLAY};
use crate::host;
use instar_guest_abi::{DeviceConfig, ErrorCode, DEVICE_OUTPUT};
use instar_guest_commit::{commit, Commit, CommitFailure, Options, Outcome, Step};
use instar_guest_sdk::memory::Change;
use instar_guest_sdk::{DriverResult, Source};
use instar_guest_view::{Ancestors, Layers};
use instar_plugin_api::{Context, ImageFacts, Incoming, Role};
use std::collections::{BTreeMap, BTreeSet};

/// No file may become longer than this in bytes, whatever the verdict allows: the disk is full.
const DISK: u64 = 48 << 20;

/// A target: change the images, and commit them.
pub fn run_changed(pairs: &Pairs, input: &[u8]) {
    pairs.choose(input).into_iter().for_each(|fixture| run(fixture, apply(fixture, input)));
}

/// What the host halves say of these images: the configuration of each, if they may be committed.
pub(super) fn admitted(fixture: &Fixture, files: &Files) -> Option<BTreeMap<u32, DeviceConfig>> {
    let look = |(device, bytes): (&u32, &Vec<u8>)| Some((*device, host::look(fixture.formats[device], bytes)?));
    let facts: BTreeMap<u32, ImageFacts> = files.iter().map(look).collect::<Option<_>>()?;
    let ask = |device: u32, role, context: Context<'_>| {
        let verdict = host::verdict(fixture.formats[&device], role, &facts[&device], &context);
        (verdict.code == 0).then_some(verdict.max_length)
    };
    let chain = fixture.chain();
    let (overlay, backing) = (&facts[&OVERLAY], &facts[&DEVICE_OUTPUT]);
    if overlay.virtual_size > backing.virtual_size && !fixture.resize {
        return None;
    }
    // The engine compares identities, and opens what has to record another one.
    let next = |parent: u32, child: u32| (fixture.formats[&parent].next_identity)(&facts[&parent], &facts[&child]);
    let goes = |(&child, &parent): (&u32, &u32)| facts[&child].goes_with(&facts[&parent], &next(parent, child));
    if !chain.iter().zip(chain.iter().skip(1)).all(goes) {
        return None;
    }
    let merged: Vec<u32> = chain.iter().copied().take_while(|&device| device != DEVICE_OUTPUT).collect();
    let mut longest = BTreeMap::new();
    for (index, &device) in merged.iter().enumerate() {
        let role = if fixture.keeps_overlay() { Role::Read } else { Role::Empty };
        let lowest = index + 1 == merged.len();
        let parent_identity_changes = lowest && facts[&device].follows(&next(DEVICE_OUTPUT, device));
        let context = Context::reading(Some(&facts[&chain[index + 1]]), true);
        longest.insert(device, ask(device, role, Context { parent_identity_changes, ..context })?);
    }
    let arriving = Incoming::from_layers(merged.iter().map(|device| &facts[device]))?;
    let parent = facts.get(&ANCESTOR);
    let max_length = ask(DEVICE_OUTPUT, Role::Write, Context::writing(parent, arriving))?.max(backing.file_length);
    longest.insert(DEVICE_OUTPUT, max_length);
    if let Some(ancestor) = parent {
        ask(DEVICE_OUTPUT, Role::Below, Context::reading(Some(ancestor), false))?;
    }
    for (index, device) in chain.iter().enumerate().skip(merged.len() + 1) {
        let below = chain.get(index + 1).map(|device| &facts[device]);
        ask(*device, Role::Below, Context::reading(below, false))?;
    }
    let configs = facts.iter().map(|(&device, facts)| {
        let longest = longest.get(&device).copied().unwrap_or(0).max(facts.file_length);
        let follows = merged.last() == Some(&device) && facts.follows(&next(DEVICE_OUTPUT, device));
        (device, config(device, facts, follows || matches!(device, OVERLAY | DEVICE_OUTPUT), longest))
    });
    let mut configs: BTreeMap<u32, DeviceConfig> = configs.collect();
    configs.values_mut().for_each(|config| config.max_length = config.max_length.min(DISK.max(config.file_length)));
    Some(configs)
}

/// The devices of a fixture's commit, held to what the host would let its guest do. If the overlay is kept, the
/// lowest layer that is merged is the one that may record its parent's identity.
pub(super) fn hold(fixture: &Fixture, files: Files, configs: &BTreeMap<u32, DeviceConfig>) -> BoundedDevices {
    let middle = configs.get(&MIDDLE).filter(|_| fixture.files.contains_key(&MIDDLE));
    let kept = middle.or(fixture.keeps_overlay().then_some(&configs[&OVERLAY]));
    BoundedDevices::commit(files, &configs[&OVERLAY], kept, &configs[&DEVICE_OUTPUT])
}

/// The guest's part, in the sandbox that was asked for, or as a function. A sandbox knows nothing of images that are two files in
/// one.
pub(super) fn guest(
    fixture: &Fixture,
    io: &mut BoundedDevices,
    configs: &BTreeMap<u32, DeviceConfig>,
) -> Result<Outcome, CommitFailure> {
    match sandboxed::chosen() {
        Some(choice) if !fixture.formats.values().any(|format| format.packed) => {
            sandboxed::run(choice, fixture, io, configs)
        }
        _ => called(fixture, io, configs),
    }
}

/// The guest's part as a function, as `guest/commit/src/run.rs` does it.
pub(super) fn called(
    fixture: &Fixture,
    io: &mut BoundedDevices,
    configs: &BTreeMap<u32, DeviceConfig>,
) -> Result<Outcome, CommitFailure> {
    let at = |error| CommitFailure { step: Step::Check, error };
    let chain = fixture.chain();
    let mut open = |devices: &[u32]| -> DriverResult<Vec<Box<dyn Source>>> {
        devices.iter().map(|device| open_source(fixture.formats[device], io, &configs[device])).collect()
    };
    let below_output = chain.iter().position(|&device| device == DEVICE_OUTPUT).unwrap_or(0);
    let mut sources = open(&chain[..below_output]).map_err(at)?;
    let layers = open(&chain[below_output + 1..]).map_err(at)?;
    let has_layers = !layers.is_empty();
    let mut sink = open_sink(fixture.formats[&DEVICE_OUTPUT], io, &configs[&DEVICE_OUTPUT], has_layers).map_err(at)?;
    let mut below = Ancestors::new(layers);
    let mut source: Box<dyn Source> = match sources.pop() {
        Some(only) if sources.is_empty() => only,
        last => Box::new(Layers::new(sources.into_iter().chain(last).collect())),
    };
    let mut images = Commit { source: source.as_mut(), sink: sink.as_mut(), below: &mut below };
    let options =
        Options { resize_backing: fixture.resize, keep_overlay: fixture.keeps_overlay(), ..Options::default() };
    commit(io, &mut images, options, &mut |_| {})
}

/// What the snapshots of overlay and backing read as.
pub(super) fn snapshots(fixture: &Fixture, files: &Files) -> Vec<Vec<u8>> {
    let both = [OVERLAY, DEVICE_OUTPUT].into_iter();
    both.flat_map(|device| fixture.formats[&device].kit.snapshots(&files[&device])).collect()
}

pub(super) fn run(fixture: &Fixture, files: Files) {
    if std::env::var_os("FUZZ_EXPLAIN").is_some() {
        explain(fixture, &files);
    }
    let Some(configs) = admitted(fixture, &files) else { return };
    let all_sound = files.iter().all(|(device, bytes)| sound(fixture.formats[device], bytes));
    // What makes no sense cannot be compared with anything.
    let before = all_sound.then(|| quietly(|| (views(fixture, &files), snapshots(fixture, &files))).ok()).flatten();
    let mut io = hold(fixture, files.clone(), &configs);
    let result = guest(fixture, &mut io, &configs);
    let now = &io.devices.files;
    let changed = |device| now[&device] != files[&device];
    assert!(!changed_elsewhere(fixture, &files, now), "a file that is only read has changed");
    if let Some((old, old_snapshots)) = &before {
        let new = views(fixture, now);
        assert!(new[&OVERLAY] == old[&OVERLAY], "the overlay reads something else: {result:?}");
        assert!(snapshots(fixture, now) == *old_snapshots, "a snapshot reads something else: {result:?}");
        if result.is_ok() {
            let length = old[&OVERLAY].len();
            assert!(new[&DEVICE_OUTPUT][..length] == old[&OVERLAY], "the backing does not read what the overlay did");
            let rest = old[&DEVICE_OUTPUT].get(length..).unwrap_or_default();
            assert!(new[&DEVICE_OUTPUT][length..].starts_with(rest), "the rest of the backing reads something else");
            for (device, bytes) in now {
                assert!(sound(fixture.formats[device], bytes), "device {device} is not consistent any more");
                // With nothing to commit, nothing is written.
                let written = *device == DEVICE_OUTPUT || (*device == OVERLAY && !fixture.keeps_overlay());
                assert!(
                    !written || *bytes == files[device] || !fixture.formats[device].kit.is_dirty(bytes),
                    "device {device} is still dirty"
                );
            }
        }
    }
    let Err(failure) = result else {
        assert_eq!(io.devices.unflushed(), BTreeSet::new(), "a power loss would take back what is said to be done");
        return;
    };
    assert_ne!(failure.error.code, ErrorCode::InternalOverflow, "{}", failure.error);
    match failure.step {
        Step::Check | Step::Plan => assert_eq!(io.devices.log, vec![], "{:?} {}", failure.step, failure.error),
        Step::Write if changed(OVERLAY) && fixture.formats[&OVERLAY].kit.records_parent() => {
            assert!(
                fixture.formats[&OVERLAY].kit.differ_by_parent(&files[&OVERLAY], &now[&OVERLAY]),
                "{}",
                failure.error
            );
        }
        Step::Write => {
            let of_overlay = |c: &Change| {
                matches!(c, Change::Write { device: OVERLAY, .. } | Change::SetLength { device: OVERLAY, .. })
            };
            assert!(!io.devices.log.iter().any(of_overlay), "{}", failure.error);
        }
        Step::Verify | Step::Empty => {}
    }
}

/// Say what an input has changed: of each file the first bytes that differ, as they are and as they were.
fn explain(fixture: &Fixture, files: &Files) {
    for (device, now) in files {
        let was = &fixture.files[device];
        eprintln!("device {device}, {:?}: {} bytes, {} before", fixture.formats[device], now.len(), was.len());
        let differ = |at: &usize| now.get(*at) != was.get(*at);
        for at in (0..now.len().max(was.len())).filter(differ).take(64) {
            eprintln!("  {at:#x}: {:02x?}, {:02x?} before", now.get(at), was.get(at));
        }
    }
}

fn changed_elsewhere(fixture: &Fixture, before: &Files, now: &Files) -> bool {
    let read_only = fixture.chain().iter().filter(|device| !matches!(**device, OVERLAY | DEVICE_OUTPUT));
    let mut read_only = read_only.map(|device| {
        let (was, is) = (&before[device], &now[device]);
        let kit = fixture.formats[device].kit;
        was != is && !(*device == MIDDLE && kit.records_parent() && kit.differ_by_parent(was, is))
    });
    read_only.any(|changed| changed) || now.len() != before.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise the targets would try nothing but refusals.
    #[test]
    fn images_without_a_change_are_committed() {
        for pairs in Pairs::all() {
            for (index, fixture) in pairs.fixtures.iter().enumerate() {
                let name = &pairs.target;
                let configs = admitted(fixture, &fixture.files).unwrap_or_else(|| panic!("{name} {index} is refused"));
                let mut io = hold(fixture, fixture.files.clone(), &configs);
                guest(fixture, &mut io, &configs).unwrap_or_else(|failure| panic!("{name} {index}: {}", failure.error));
                run(fixture, fixture.files.clone());
                let all_sound = fixture.files.iter().all(|(device, bytes)| sound(fixture.formats[device], bytes));
                assert!(all_sound, "{name} {index} cannot be compared");
            }
        }
    }
}
