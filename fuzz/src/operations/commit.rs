//! Commits between images of every pair of formats.

use super::change::apply;
use super::qcow2::common::bitmaps::{BitmapSpec, Bits, AUTO, IN_USE};
use super::qcow2::common::builder::{build, Spec, State};
use super::qcow2::common::damage;
use super::qcow2::common::pair::data;
use super::strict::Strict;
use super::vmdk::common as grains;
use super::{choose, config, open_sink, open_source, qcow2, quietly, sound, views, vmdk, Bed, Files, Format};
use super::{ANCESTOR, MIDDLE, OVERLAY};
use crate::host;
use instar_guest_abi::{DeviceConfig, ErrorCode, DEVICE_OUTPUT};
use instar_guest_commit::{commit, Ancestors, Commit, CommitFailure, Layers, Options, Outcome, Step};
use instar_guest_sdk::memory::Change;
use instar_guest_sdk::{DriverResult, Source};
use instar_plugin_api::{CommitRole, ImageFacts};
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// No file may become longer than this in bytes, whatever the verdict allows: the disk is full.
const DISK: u64 = 48 << 20;

/// qcow2 into qcow2: cluster sizes, refcount widths, versions, snapshots, bitmaps, subclusters, compression, repairs, growth.
pub fn qcow2_beds() -> Vec<Bed> {
    use Format::Qcow2;
    let mut beds = Vec::new();
    let extents = |spec: Spec| {
        spec.with(data([0, 1, 5, 40], 0x21)).with([
            (7, State::Zero),
            (8, State::ZeroAllocated(9)),
            (9, State::Deflated(3)),
        ])
    };
    for (bits, top, snapshots, order, version, extended) in [
        (9, 9, 0, 4, 3, false),
        (9, 10, 1, 3, 3, false),
        (12, 9, 0, 6, 3, false),
        (10, 10, 2, 4, 2, false),
        (14, 9, 1, 4, 3, true),
        (9, 12, 0, 5, 3, false),
    ] {
        let size = 96u64 << bits;
        let backing = Spec { snapshots, refcount_order: order, version, extended, free: 2, ..Spec::new(bits, size) };
        let backing = build(&backing.with(data([0, 3, 40], 0x43)).with([(2, State::Deflated(5))]));
        let ancestor = build(&Spec::new(bits, size).with(data(0..20, 0x66)));
        let overlay = build(&extents(Spec { snapshots: snapshots / 2, ..Spec::new(top, size) }));
        beds.push([(OVERLAY, overlay), (DEVICE_OUTPUT, backing), (ANCESTOR, ancestor)].to_vec());
    }
    // Subclusters on both sides.
    let mixed = [(3, State::Mixed(0x71, 0xff00, 0xff)), (4, State::MixedZero(0xf0f)), (5, State::Data(2))];
    let subclusters = Spec { extended: true, ..Spec::new(14, 40 << 14) };
    let under = subclusters.clone().with([(3, State::Mixed(0x17, 0xf, 0xf0)), (6, State::Deflated(4))]);
    beds.push([(OVERLAY, build(&subclusters.with(mixed))), (DEVICE_OUTPUT, build(&under))].to_vec());
    // Bitmaps, and growth.
    let bitmap = |flags, bits: &[Bits]| BitmapSpec::new(flags, 9, bits);
    let bitmaps = vec![
        bitmap(AUTO, &[Bits::None]),
        bitmap(AUTO, &[Bits::Bytes(0x81), Bits::None]),
        bitmap(AUTO | IN_USE, &[Bits::Bytes(0x18)]),
        bitmap(0, &[Bits::All]),
    ];
    for (size, snapshots) in [(300u64, 0), (90, 1)] {
        let spec = Spec { bitmaps: bitmaps.clone(), autoclear: 1, snapshots, ..Spec::new(9, size << 9) };
        let spec = spec.with(data([0, 3, 40], 0x43));
        beds.push([(OVERLAY, build(&extents(Spec::new(9, 300 << 9)))), (DEVICE_OUTPUT, build(&spec))].to_vec());
    }
    // Not closed cleanly, on one side each.
    for spoiled in [OVERLAY, DEVICE_OUTPUT] {
        let spec = Spec { snapshots: 1, leaks: 3, ..Spec::new(9, 96 << 9) };
        let mut images =
            [(OVERLAY, build(&extents(Spec::new(9, 96 << 9)))), (DEVICE_OUTPUT, build(&spec.with(data([0, 3], 7))))];
        images.iter_mut().filter(|(device, _)| *device == spoiled).for_each(|(_, bytes)| damage::spoil(bytes, 3));
        beds.push(images.to_vec());
    }
    // Two layers at once, the upper one longer; a refcount table that has to grow; blocks in front and a file that is cut.
    let middle = build(&Spec::new(9, 80 << 9).with(data([1, 2, 60], 0x55)));
    let backing = Spec { leaks: 4_000, refcount_order: 6, ..Spec::new(9, 96 << 9) }.with(data([0, 3], 0x43));
    let overlay = build(&extents(Spec::new(9, 96 << 9)));
    beds.push([(OVERLAY, overlay.clone()), (MIDDLE, middle), (DEVICE_OUTPUT, build(&backing))].to_vec());
    let cut = Spec { blocks_first: true, cut: true, ..Spec::new(9, 96 << 9) }.with(data([0, 3], 0x43));
    beds.push([(OVERLAY, overlay), (DEVICE_OUTPUT, build(&cut))].to_vec());
    // An overlay that ends within its last cluster, a refcount block: it gets that cluster back when it is emptied.
    let overlay = build(&extents(Spec { cut: true, ..Spec::new(12, 96 << 9) }));
    assert!(!overlay.len().is_multiple_of(4096));
    beds.push([(OVERLAY, overlay), (DEVICE_OUTPUT, build(&cut))].to_vec());

    let bed = |images: Vec<(u32, Vec<u8>)>| Bed {
        resize: true,
        ..Bed::new(images.into_iter().map(|(device, bytes)| (device, Qcow2, bytes)))
    };
    beds.into_iter().map(bed).collect()
}

/// vmdk into vmdk.
pub fn vmdk_beds() -> Vec<Bed> {
    use self::grains::{build, Spec, State, GRAIN};
    let size = 600 * GRAIN;
    let data = |grains: &[usize], seed| grains.iter().map(|&g| (g, State::Data(seed))).collect::<Vec<_>>();
    let top = Spec::new(size, 7, 5).with(data(&[0, 1, 5, 513, 599], 0x21)).with([(7, State::Zero)]);
    let base = Spec::new(size, 5, 4).with(data(&[0, 3, 40], 0x43)).with([(2, State::Zero)]);
    let root = Spec::new(size, 4, u32::MAX).with(data(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 513], 0x66));
    let streamed = Spec { compressed: true, redundant: false, ..top.clone() };
    let pairs = [
        (top.clone(), base.clone()),
        (top, Spec { lazy_tables: true, ..base.clone() }),
        (streamed.clone(), Spec { redundant: false, zeroed: false, grains: vec![], ..base.clone() }),
        (Spec { footer: true, ..streamed }, base),
    ];
    let bed = |(top, base): &(Spec, Spec)| {
        let images = [(OVERLAY, build(top)), (DEVICE_OUTPUT, build(base)), (ANCESTOR, build(&root))];
        Bed::new(images.map(|(device, bytes)| (device, Format::Vmdk, bytes)))
    };
    pairs.iter().map(bed).collect()
}

/// qcow2 into raw and vmdk.
pub fn cross_beds() -> Vec<Bed> {
    use self::grains::GRAIN;
    let size = 64 * GRAIN as u64;
    let overlay = |bits, extended| {
        let spec = Spec { extended, ..Spec::new(bits, size) };
        let states = [(0, State::Data(0x21)), (1, State::Zero), (3, State::Deflated(3))];
        build(&spec.with(states).with(if bits < 12 { data([20, 21], 0x13) } else { vec![] }))
    };
    let vmdk = |lazy_tables, redundant| {
        let spec = grains::Spec { lazy_tables, redundant, ..grains::Spec::new(size as usize, 5, u32::MAX) };
        grains::build(&spec.with([(0, grains::State::Data(0x43)), (21, grains::State::Zero)]))
    };
    let raw = |length: u64| (0..length).map(|i| (i / 300) as u8 | 1).collect::<Vec<u8>>();
    let bed = |top: Vec<u8>, format, base: Vec<u8>| Bed {
        resize: format == Format::Raw,
        ..Bed::new([(OVERLAY, Format::Qcow2, top), (DEVICE_OUTPUT, format, base)])
    };
    vec![
        bed(overlay(9, false), Format::Raw, raw(size)),
        bed(overlay(12, false), Format::Raw, raw(size - 700)),
        bed(overlay(14, true), Format::Raw, raw(size / 2)),
        bed(overlay(9, false), Format::Vmdk, vmdk(false, true)),
        bed(overlay(12, false), Format::Vmdk, vmdk(true, true)),
        bed(overlay(14, true), Format::Vmdk, vmdk(true, false)),
    ]
}

/// A target: qcow2 into qcow2.
pub fn qcow2_commit(input: &[u8]) {
    static BEDS: OnceLock<Vec<Bed>> = OnceLock::new();
    choose(&BEDS, qcow2_beds, input).into_iter().for_each(|bed| run(bed, apply(bed, input)));
}

/// A target: vmdk into vmdk.
pub fn vmdk_commit(input: &[u8]) {
    static BEDS: OnceLock<Vec<Bed>> = OnceLock::new();
    choose(&BEDS, vmdk_beds, input).into_iter().for_each(|bed| run(bed, apply(bed, input)));
}

/// A target: qcow2 into the other formats.
pub fn cross_commit(input: &[u8]) {
    static BEDS: OnceLock<Vec<Bed>> = OnceLock::new();
    choose(&BEDS, cross_beds, input).into_iter().for_each(|bed| run(bed, apply(bed, input)));
}

/// What the host halves say of these images: the configuration of each, if they may be committed.
fn admitted(bed: &Bed, files: &Files) -> Option<BTreeMap<u32, DeviceConfig>> {
    let look = |(device, bytes): (&u32, &Vec<u8>)| Some((*device, host::look(bed.formats[device], bytes)?));
    let facts: BTreeMap<u32, ImageFacts> = files.iter().map(look).collect::<Option<_>>()?;
    let ask = |device: u32, role, other: &ImageFacts| {
        let verdict = host::verdict(bed.formats[&device], role, &facts[&device], other);
        (verdict.code == 0).then_some(verdict.max_length)
    };
    let chain = bed.chain();
    let (overlay, backing) = (&facts[&OVERLAY], &facts[&DEVICE_OUTPUT]);
    if overlay.virtual_size > backing.virtual_size && !bed.resize {
        return None;
    }
    let merged: Vec<u32> = chain.iter().copied().take_while(|&device| device != DEVICE_OUTPUT).collect();
    let mut longest = BTreeMap::new();
    for (index, &device) in merged.iter().enumerate() {
        longest.insert(device, ask(device, CommitRole::Overlay, &facts[&chain[index + 1]])?);
    }
    // As the engine asks: with the lengths of all that arrive.
    let mut length = merged.iter().map(|device| facts[device].file_length).sum::<u64>();
    if merged.iter().skip(1).any(|device| facts[device].virtual_size < overlay.virtual_size) {
        length += overlay.virtual_size;
    }
    let mut max_length = backing.file_length;
    for device in &merged {
        let virtual_size = facts[device].virtual_size.min(overlay.virtual_size);
        let arriving = ImageFacts { file_length: length, virtual_size, ..facts[device].clone() };
        max_length = max_length.max(ask(DEVICE_OUTPUT, CommitRole::Backing, &arriving)?);
    }
    longest.insert(DEVICE_OUTPUT, max_length);
    if let Some(ancestor) = facts.get(&ANCESTOR) {
        ask(DEVICE_OUTPUT, CommitRole::Ancestor, ancestor)?;
        ask(ANCESTOR, CommitRole::Ancestor, ancestor)?;
    }
    let configs = facts.iter().map(|(&device, facts)| {
        let longest = longest.get(&device).copied().unwrap_or(0).max(facts.file_length);
        (device, config(device, facts, matches!(device, OVERLAY | DEVICE_OUTPUT), longest))
    });
    Some(configs.collect())
}

/// The guest's part, as `guest/commit/src/run.rs` does it.
fn guest(bed: &Bed, io: &mut Strict, configs: &BTreeMap<u32, DeviceConfig>) -> Result<Outcome, CommitFailure> {
    let at = |error| CommitFailure { step: Step::Check, error };
    let chain = bed.chain();
    let mut open = |devices: &[u32]| -> DriverResult<Vec<Box<dyn Source>>> {
        devices.iter().map(|device| open_source(bed.formats[device], io, &configs[device])).collect()
    };
    let below_output = chain.iter().position(|&device| device == DEVICE_OUTPUT).unwrap_or(0);
    let mut sources = open(&chain[..below_output]).map_err(at)?;
    let layers = open(&chain[below_output + 1..]).map_err(at)?;
    let has_layers = !layers.is_empty();
    let mut sink = open_sink(bed.formats[&DEVICE_OUTPUT], io, &configs[&DEVICE_OUTPUT], has_layers).map_err(at)?;
    let mut below = Ancestors::new(layers);
    let mut source: Box<dyn Source> = match sources.pop() {
        Some(only) if sources.is_empty() => only,
        last => Box::new(Layers::new(sources.into_iter().chain(last).collect())),
    };
    let mut images = Commit { source: source.as_mut(), sink: sink.as_mut(), below: &mut below };
    let keep_overlay = bed.files.contains_key(&MIDDLE);
    let options = Options { resize_backing: bed.resize, keep_overlay, ..Options::default() };
    commit(io, &mut images, options, &mut |_| {})
}

fn snapshots(bed: &Bed, files: &Files) -> Vec<Vec<u8>> {
    let qcow2 = [OVERLAY, DEVICE_OUTPUT].into_iter().filter(|device| bed.formats[device] == Format::Qcow2);
    qcow2.flat_map(|device| qcow2::of_snapshots(&files[&device])).collect()
}

fn run(bed: &Bed, files: Files) {
    if std::env::var_os("FUZZ_EXPLAIN").is_some() {
        explain(bed, &files);
    }
    let Some(mut configs) = admitted(bed, &files) else { return };
    configs.values_mut().for_each(|config| config.max_length = config.max_length.min(DISK.max(config.file_length)));
    let all_sound = files.iter().all(|(device, bytes)| sound(bed.formats[device], bytes));
    // What makes no sense cannot be compared with anything.
    let before = all_sound.then(|| quietly(|| (views(bed, &files), snapshots(bed, &files))).ok()).flatten();
    let mut io = Strict::new(files.clone(), &[&configs[&OVERLAY], &configs[&DEVICE_OUTPUT]]);
    let result = guest(bed, &mut io, &configs);
    let now = &io.devices.files;
    let changed = |device| now[&device] != files[&device];
    assert!(!changed_elsewhere(bed, &files, now), "a file that is only read has changed");
    if let Some((old, old_snapshots)) = &before {
        let new = views(bed, now);
        assert!(new[&OVERLAY] == old[&OVERLAY], "the overlay reads something else: {result:?}");
        assert!(snapshots(bed, now) == *old_snapshots, "a snapshot reads something else: {result:?}");
        if result.is_ok() {
            let length = old[&OVERLAY].len();
            assert!(new[&DEVICE_OUTPUT][..length] == old[&OVERLAY], "the backing does not read what the overlay did");
            let rest = old[&DEVICE_OUTPUT].get(length..).unwrap_or_default();
            assert!(new[&DEVICE_OUTPUT][length..].starts_with(rest), "the rest of the backing reads something else");
            for (device, bytes) in now {
                assert!(sound(bed.formats[device], bytes), "device {device} is not consistent any more");
                let written = *device == DEVICE_OUTPUT || (*device == OVERLAY && !bed.files.contains_key(&MIDDLE));
                if written && bed.formats[device] == Format::Qcow2 {
                    assert!(!qcow2::common::pair::is_dirty(bytes), "device {device} is still dirty");
                }
            }
        }
    }
    let Err(failure) = result else { return };
    assert_ne!(failure.error.code, ErrorCode::InternalOverflow, "{}", failure.error);
    match failure.step {
        Step::Check | Step::Plan => assert_eq!(io.devices.log, vec![], "{:?} {}", failure.step, failure.error),
        Step::Write if changed(OVERLAY) && bed.formats[&OVERLAY] == Format::Vmdk => {
            // Its parent's content ID, and nothing of what it holds.
            let entries = |files: &Files| quietly(|| vmdk::entries(&files[&OVERLAY])).ok();
            assert_eq!(entries(now), entries(&files), "{}", failure.error);
        }
        Step::Write => {
            let of_overlay = |c: &Change| {
                matches!(c, Change::Write { device: OVERLAY, .. } | Change::SetLength { device: OVERLAY, .. })
            };
            assert!(!io.devices.log.iter().any(of_overlay), "{}", failure.error);
        }
        Step::Empty => {}
    }
}

/// Say what an input has changed: of each file the first bytes that differ, as they are and as they were.
fn explain(bed: &Bed, files: &Files) {
    for (device, now) in files {
        let was = &bed.files[device];
        eprintln!("device {device}, {:?}: {} bytes, {} before", bed.formats[device], now.len(), was.len());
        let differ = |at: &usize| now.get(*at) != was.get(*at);
        for at in (0..now.len().max(was.len())).filter(differ).take(64) {
            eprintln!("  {at:#x}: {:02x?}, {:02x?} before", now.get(at), was.get(at));
        }
    }
}

fn changed_elsewhere(bed: &Bed, before: &Files, now: &Files) -> bool {
    let read_only = bed.chain().into_iter().filter(|device| !matches!(*device, OVERLAY | DEVICE_OUTPUT));
    let mut read_only = read_only.map(|device| now[&device] != before[&device]);
    read_only.any(|changed| changed) || now.len() != before.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise the targets would try nothing but refusals.
    #[test]
    fn images_without_a_change_are_committed() {
        for (name, beds) in [("qcow2", qcow2_beds()), ("vmdk", vmdk_beds()), ("cross", cross_beds())] {
            for (index, bed) in beds.iter().enumerate() {
                let configs = admitted(bed, &bed.files).unwrap_or_else(|| panic!("{name} {index} is refused"));
                let mut io = Strict::new(bed.files.clone(), &[&configs[&OVERLAY], &configs[&DEVICE_OUTPUT]]);
                guest(bed, &mut io, &configs).unwrap_or_else(|failure| panic!("{name} {index}: {}", failure.error));
                run(bed, bed.files.clone());
                let all_sound = bed.files.iter().all(|(device, bytes)| sound(bed.formats[device], bytes));
                assert!(all_sound, "{name} {index} cannot be compared");
            }
        }
    }
}
