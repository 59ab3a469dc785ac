//! Backings with extended L2 entries: content, consistency, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::panic, missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_qcow2_testkit::be64;
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::checker::View;
use instar_qcow2_testkit::pair::{commit_and_verify, is_campaign, verify_crashes, Pair};

const BITS: u32 = 14;

fn extended(clusters: u64) -> Spec {
    Spec { extended: true, ..Spec::new(BITS, clusters << BITS) }
}

/// Every state that a cluster can have with extended entries.
const STATES: [Option<State>; 10] = [
    None,
    Some(State::Data(0x11)),
    Some(State::Zero),
    Some(State::ZeroAllocated(0x22)),
    Some(State::Deflated(0x33)),
    Some(State::Mixed(0x44, 0x0000_00ff, 0)),
    Some(State::Mixed(0x55, 0xf0f0_0000, 0x0f0f_0001)),
    Some(State::Mixed(0x66, 0, 0xff)),
    Some(State::Mixed(0x77, 0, 0)),
    Some(State::MixedZero(0xffff_0000)),
];

/// An overlay and a backing in which every state lies over every other.
fn everything(top_extended: bool) -> (Spec, Spec) {
    let tops: Vec<Option<State>> = STATES
        .into_iter()
        .filter(|s| top_extended || !matches!(s, Some(State::Mixed(..) | State::MixedZero(_))))
        .collect();
    let count = (tops.len() * STATES.len()) as u64;
    let mut overlay = Spec { extended: top_extended, ..Spec::new(BITS, count << BITS) };
    let mut backing = extended(count);
    for (i, (top, base)) in tops.iter().flat_map(|t| STATES.iter().map(move |b| (*t, *b))).enumerate() {
        overlay.clusters.extend(top.map(|state| (i as u64, state)));
        backing.clusters.extend(base.map(|state| (i as u64, state)));
    }
    (overlay, backing)
}

fn ancestor(clusters: u64) -> Vec<u8> {
    build(&Spec::new(BITS, clusters << BITS).with((0..clusters).map(|c| (c, State::Data(0x99)))))
}

#[test]
fn every_state_over_every_other() {
    for top_extended in [false, true] {
        let (overlay, backing) = everything(top_extended);
        for snapshots in [0, 2] {
            let backing = Spec { snapshots, ..backing.clone() };
            let mut pair = Pair::new(&overlay, &backing);
            commit_and_verify(&pair);
            pair.ancestor = Some(ancestor(backing.virtual_size >> BITS));
            commit_and_verify(&pair);
        }
    }
}

/// The overlay's clusters are parts of a subcluster, whole ones, several, or several clusters.
#[test]
fn overlays_with_other_cluster_sizes() {
    for (base_bits, bits) in [(14, 9), (14, 12), (14, 16), (16, 9), (16, 10), (16, 12)] {
        let count = STATES.len() as u64 * 4;
        let mut backing = Spec { extended: true, ..Spec::new(base_bits, count << base_bits) };
        backing.clusters.extend((0..count).filter_map(|i| STATES[i as usize % STATES.len()].map(|state| (i, state))));
        let mut overlay = Spec::new(bits, count << base_bits);
        for guest in 0..overlay.virtual_size >> bits {
            match guest * 7919 % 11 {
                0 | 1 => overlay.clusters.insert(guest, State::Data(0xa0)),
                2 => overlay.clusters.insert(guest, State::Zero),
                3 => overlay.clusters.insert(guest, State::ZeroAllocated(0xb0)),
                _ => None,
            };
        }
        for snapshots in [0, 1] {
            let mut pair = Pair::new(&overlay, &Spec { snapshots, ..backing.clone() });
            commit_and_verify(&pair);
            // A third of the ancestor is zero.
            let below = (0..overlay.virtual_size >> 12).filter(|c| c % 3 != 0).map(|c| (c, State::Data(0x99)));
            pair.ancestor = Some(build(&Spec::new(12, overlay.virtual_size).with(below)));
            commit_and_verify(&pair);
        }
    }
}

/// QEMU ends a file behind the last subcluster that it wrote. A commit that brings a part of a later one leaves a file that holds
/// all of it: into what reads as cut off, nothing can be committed any more.
#[test]
fn the_file_ends_behind_the_last_subcluster_with_data() {
    let bits = 16;
    let subcluster = 1 << (bits - 5);
    for (state, is_extended, held) in [
        (State::Mixed(0x44, 0x0000_00ff, 0), true, 8 * subcluster),
        (State::Mixed(0x44, 0x0000_00ff, 0xffff_0000), true, 8 * subcluster),
        (State::ZeroAllocated(0x22), true, subcluster),
        (State::ZeroAllocated(0x22), false, subcluster),
    ] {
        let overlay = Spec::new(9, 1 << bits).with([(21 * subcluster / 512, State::Data(0x12))]);
        let backing =
            build(&Spec { extended: is_extended, blocks_first: true, ..Spec::new(bits, 1 << bits) }.with([(0, state)]));
        let [(_, entry, _)] = View::new(&backing).entries()[..] else { panic!("one cluster was built") };
        let host = entry & 0x00ff_ffff_ffff_fe00;
        assert_eq!(backing.len() as u64, host + (1 << bits), "the cluster is the last one of the file");
        for fixed in [false, true] {
            let mut pair = Pair::new(&overlay, &Spec::new(bits, 1 << bits));
            pair.fixed = fixed;
            pair.backing = backing.clone();
            if !fixed {
                pair.backing.truncate((host + held) as usize);
            }
            verify_crashes(&pair);
            pair.backing = commit_and_verify(&pair).files[&DEVICE_OUTPUT].clone();
            commit_and_verify(&pair);
        }
    }
}

#[test]
fn the_disk_ends_within_a_subcluster() {
    for end in [1536, 512 * 31, (1 << BITS) - 1024] {
        for state in [State::Data(0x12), State::Zero, State::ZeroAllocated(1)] {
            for base in STATES {
                let size = (2 << BITS) + end;
                let overlay = Spec::new(BITS, size).with([(2, state)]);
                let mut backing = Spec { extended: true, ..Spec::new(BITS, size) };
                backing.clusters.extend(base.map(|state| (2, state)));
                let mut pair = Pair::new(&overlay, &backing);
                commit_and_verify(&pair);
                pair.ancestor = Some(ancestor(3));
                commit_and_verify(&pair);
                // And the overlay alone ends there.
                pair.backing = build(&Spec { virtual_size: 3 << BITS, ..backing });
                commit_and_verify(&pair);
            }
        }
    }
}

/// Some of all pairs of clusters: there are many crash points. `make crash` takes more of them.
fn verify_crashes_of_some(snapshots: usize) {
    let one_in = if is_campaign() { 7 } else { 13 };
    let (mut overlay, backing) = everything(true);
    let mut backing = Spec { snapshots, ..backing };
    overlay.clusters.retain(|guest, _| guest % one_in == 1);
    backing.clusters.retain(|guest, _| guest % one_in == 1);
    let mut pair = Pair::new(&overlay, &backing);
    pair.ancestor = Some(ancestor(backing.virtual_size >> BITS));
    verify_crashes(&pair);
}

#[test]
fn every_crash_point() {
    verify_crashes_of_some(0);
}

#[test]
fn every_crash_point_with_a_snapshot() {
    verify_crashes_of_some(1);
}

/// What qemu does, too: only the subclusters that the overlay holds are written.
#[test]
fn no_more_than_what_arrives_is_written() {
    let overlay = Spec::new(9, 64 << BITS).with([(32 * 5 + 3, State::Data(1))]);
    let mut pair = Pair::new(&overlay, &extended(64));
    pair.ancestor = Some(ancestor(64));
    let io: MemoryDevices = commit_and_verify(&pair);
    let backing = &io.files[&DEVICE_OUTPUT];
    assert_eq!(View::new(backing).entries()[0].2, 1 << 3);
    let first = View::new(backing).entries()[0].1 & 0x00ff_ffff_ffff_fe00;
    let data: u64 = io
        .log
        .iter()
        .map(|change| match change {
            Change::Write { device: DEVICE_OUTPUT, offset, bytes } if (first..first + (1 << BITS)).contains(offset) => {
                bytes.len() as u64
            }
            _ => 0,
        })
        .sum();
    assert_eq!(data, 512);
    assert_eq!(be64(backing, 72), 16);
}
