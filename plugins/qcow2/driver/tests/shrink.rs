//! Images that get another size: content, snapshots, consistency, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::conformance::{verify_resize, ANCESTOR};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_guest_sdk::random::Random;
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::pair::data;
use instar_qcow2_testkit::{be32, be64, Kit};

const CRASHES: Crashes = Crashes { drawn: 1, seed: 7 };

/// Resize; returns the image afterwards.
fn resized(files: &Files, size: u64) -> Files {
    let (report, after) = verify_resize(&Kit, files, size, CRASHES);
    assert!(report.committed == 1 && report.states > 1, "{report:?}");
    let after = after.unwrap();
    assert_eq!(be64(&after[&DEVICE_OUTPUT], 24), size);
    after
}

fn alone(spec: &Spec) -> Files {
    Files::from([(DEVICE_OUTPUT, build(spec))])
}

#[test]
fn the_end_anywhere_in_every_version() {
    for (version, extended) in [(2, false), (3, false), (3, true)] {
        let bits = if extended { 14 } else { 9 };
        let spec = Spec { extended, ..Spec::new(bits, 150 << bits) }.version(version);
        let files = alone(&spec.with(data([0, 3, 62, 63, 64, 70, 127, 128, 149], 0x21)));
        for sectors in [1, 3, 4, 63, 64, 65, 70, 71, 100, 128, 129, 149] {
            let part = if extended { 512 } else { 0 };
            resized(&files, (sectors << bits) - part);
        }
    }
}

#[test]
fn clusters_of_every_kind_go() {
    let states = [
        (0, State::Data(1)),
        (1, State::Zero),
        (2, State::ZeroAllocated(9)),
        (3, State::Deflated(3)),
        (4, State::Deflated(4)),
        (5, State::Data(5)),
        (9, State::Deflated(6)),
        (70, State::Deflated(7)),
        (80, State::Data(8)),
    ];
    let files = alone(&Spec::new(9, 90 << 9).with(states));
    for clusters in 1..=12 {
        let after = resized(&files, clusters << 9);
        let back = resized(&after, 90 << 9);
        assert_eq!(be32(&back[&DEVICE_OUTPUT], 36), 2);
    }
}

#[test]
fn snapshots_keep_their_size_and_their_data() {
    for extended in [false, true] {
        let bits = if extended { 14 } else { 9 };
        let spec = Spec { extended, snapshots: 2, ..Spec::new(bits, 80 << bits) };
        let files = alone(&spec.with(data([0, 10, 20, 63, 64, 79], 0x33)).with([(12, State::Deflated(2))]));
        for clusters in [2, 11, 20, 64, 79] {
            let after = resized(&files, (clusters << bits) - 512);
            resized(&after, 85 << bits);
        }
    }
}

#[test]
fn over_longer_and_shorter_ancestors() {
    for ancestor in [10, 30, 200] {
        let mut files = alone(&Spec::new(10, 100 << 10).with(data([0, 5, 29, 60, 99], 0x41)));
        files.insert(ANCESTOR, build(&Spec::new(9, ancestor << 9).with(data(0..ancestor, 0x66))));
        for sectors in [3, 11, 60, 133] {
            let after = resized(&files, sectors << 9);
            let grown = resized(&after, 150 << 10);
            resized(&grown, (sectors << 9) + 512);
        }
    }
}

#[test]
fn the_file_gives_its_space_back() {
    let spec = Spec { blocks_first: true, ..Spec::new(9, 128 << 9) };
    let files = alone(&spec.with(data(64..128, 0x21)));
    let after = resized(&files, 64 << 9);
    let (before, after) = (files[&DEVICE_OUTPUT].len(), after[&DEVICE_OUTPUT].len());
    assert!(after + 60 * 512 < before, "{before} {after}");
}

#[test]
fn drawn_images() {
    let mut states = 0;
    for number in 0..40 {
        let random = &mut Random::seeded(number);
        let size = random.below(300) + 2;
        let held: Vec<(u64, State)> = (0..size)
            .filter_map(|cluster| match random.below(6) {
                0 => Some((cluster, State::Data(cluster as u8))),
                1 => Some((cluster, State::Zero)),
                2 => Some((cluster, State::Deflated((cluster % 32) as u8))),
                3 => Some((cluster, State::ZeroAllocated(cluster as u8))),
                _ => None,
            })
            .collect();
        let spec = Spec { snapshots: usize::from(random.coin()), ..Spec::new(9, size << 9) };
        let mut files = alone(&spec.with(held));
        for _ in 0..2 {
            let wanted = random.below(320) + 1;
            let (report, after) = verify_resize(&Kit, &files, wanted << 9, Crashes { drawn: 0, seed: number });
            states += report.states;
            files = after.unwrap();
        }
    }
    assert!(states > 400, "{states}");
}
