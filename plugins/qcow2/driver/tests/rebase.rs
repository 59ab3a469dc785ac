//! An image that gets another backing file: at every instant of a power loss it reads what it read, through whichever of the
//! two it names then, and running it again finishes it.
#![allow(missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::crash::{Crashes, Files};
use instar_guest_sdk::random::Random;
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::header::{with_header, BACKING_FORMAT};
use instar_qcow2_testkit::pair::data;
use instar_qcow2_testkit::Kit;
use instar_testkit::rebase::{Below, Rebased, Seen};

const OLD: u32 = 3;
const NEW: u32 = 4;
const NONE: Below<'_> = (b"", &[]);
const CRASHES: Crashes = Crashes { drawn: 6, seed: 3 };
/// It fills the first sector of a header, or more than that.
const LONG: &[u8] = &[b'n'; 370];

fn named(spec: &Spec, name: &[u8]) -> Vec<u8> {
    if name.is_empty() {
        return build(spec);
    }
    with_header(build(spec), &[(BACKING_FORMAT, b"qcow2".to_vec())], 8, name)
}

fn rebased(overlay: &Spec, layers: &[(u32, Spec)], old: Below<'_>, new: Below<'_>, crashes: Crashes) -> Seen {
    let mut files = Files::from([(DEVICE_OUTPUT, named(overlay, old.0))]);
    files.extend(layers.iter().map(|(device, spec)| (*device, build(spec))));
    let (seen, _) = Rebased { kit: &Kit, format: "qcow2", files, old, new }.verify(crashes);
    println!("{seen:?}");
    seen
}

/// Clusters of its own, of every kind, in a disk of `clusters`.
fn overlay(bits: u32, clusters: u64) -> Spec {
    let spec = Spec::new(bits, (clusters << bits) - 512).with(data([0, 4], 0x21));
    spec.with([(1, State::Zero), (2, State::Deflated(3)), (5, State::ZeroAllocated(7))])
}

/// An old backing file, and a new one that is the same in places.
fn backings(bits: u32, lengths: [u64; 2]) -> [(u32, Spec); 2] {
    let [old, new] = lengths.map(|clusters| Spec::new(bits, clusters << bits));
    let within = |clusters: [u64; 8], length: u64| clusters.into_iter().filter(move |cluster| *cluster < length);
    let old = old.with(data(within([0, 1, 3, 6, 7, 8, 70, 71], lengths[0]), 0x43));
    let new = new.with(data(within([0, 3, 5, 7, 9, 10, 71, 72], lengths[1]), 0x43)).with(data([8], 0x55));
    [(OLD, old), (NEW, new.with([(6, State::Deflated(9))]))]
}

#[test]
fn every_crash_point_over_longer_and_shorter_ones() {
    for lengths in [[12, 12], [9, 12], [12, 9], [80, 9], [9, 80], [80, 80]] {
        for clusters in [11, 75] {
            for name in [&b"new"[..], LONG] {
                let bits = if name == LONG { 10 } else { 9 };
                let layers = backings(bits, lengths);
                let seen = rebased(&overlay(bits, clusters), &layers, (b"old", &[OLD]), (name, &[NEW]), CRASHES);
                assert!(seen.bytes > 0 && seen.states > 2 && seen.between > 0, "{seen:?}");
            }
        }
    }
}

#[test]
fn flattened_and_over_the_first_backing_file() {
    for version in [2, 3] {
        for lengths in [[12, 12], [9, 80], [80, 9]] {
            let mut own = Spec::new(9, (75 << 9) - 512).version(version).with(data([0, 4, 64], 0x21));
            if version == 3 {
                own = own.with([(1, State::Zero), (5, State::ZeroAllocated(7))]);
            }
            let layers = backings(9, lengths);
            let flat = rebased(&own, &layers, (b"old", &[OLD]), NONE, CRASHES);
            let first = rebased(&own, &layers, NONE, (b"new", &[NEW]), CRASHES);
            let other = rebased(&own, &layers, (b"old", &[OLD]), (b"new", &[NEW]), CRASHES);
            for seen in [flat, first, other] {
                assert!(seen.bytes > 0 && seen.states > 2 && seen.between > 0, "{seen:?}");
            }
        }
    }
}

#[test]
fn subclusters() {
    let own = Spec { extended: true, ..Spec::new(14, (8 << 14) - 512) };
    let own = own.with([(0, State::Mixed(0x21, 0xff, 0xff00)), (1, State::MixedZero(0x0f0f)), (2, State::Zero)]);
    let layers = [(OLD, Spec::new(12, 30 << 12).with(data(0..20, 0x43))), (NEW, backings(12, [9, 12])[1].1.clone())];
    for new in [(&b"new"[..], &[NEW][..]), NONE] {
        let seen = rebased(&own, &layers, (b"old", &[OLD]), new, CRASHES);
        assert!(seen.bytes > 0 && seen.states > 5, "{seen:?}");
    }
}

#[test]
fn a_layer_is_dropped_and_snapshots_stay() {
    let layers = backings(9, [12, 12]);
    for snapshots in [0, 2] {
        let own = Spec { snapshots, ..overlay(9, 12) };
        let seen = rebased(&own, &layers, (b"old", &[OLD, NEW]), (b"new", &[NEW]), CRASHES);
        assert!(seen.bytes > 0 && seen.between > 3, "{seen:?}");
        let seen = rebased(&own, &layers, (b"new", &[NEW]), (b"old", &[OLD, NEW]), CRASHES);
        assert!(seen.bytes > 0 && seen.between > 3, "{seen:?}");
    }
}

#[test]
fn drawn_images() {
    let mut states = 0;
    for number in 0..24 {
        let random = &mut Random::seeded(number);
        let mut drawn = |bits: u32| {
            let size = random.below(90) + 2;
            let held: Vec<(u64, State)> = (0..size)
                .filter_map(|cluster| match random.below(9) {
                    0 | 1 => Some((cluster, State::Data(0x30))),
                    2 => Some((cluster, State::Zero)),
                    3 => Some((cluster, State::Deflated(3))),
                    4 => Some((cluster, State::ZeroAllocated(9))),
                    _ => None,
                })
                .collect();
            Spec::new(bits, (size << bits) - if random.coin() { 512 } else { 0 }).with(held)
        };
        let (own, old, new) = (drawn(10), drawn(9), drawn(11));
        let layers = [(OLD, old), (NEW, new)];
        let crashes = Crashes { drawn: 4, seed: number };
        states += rebased(&own, &layers, (b"old", &[OLD]), (b"new", &[NEW]), crashes).states;
    }
    assert!(states > 300, "{states}");
}
