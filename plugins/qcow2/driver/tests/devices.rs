//! A backing on a device that keeps its length, such as a logical volume, full of stale bytes behind the image.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Step;
use instar_guest_sdk::abi::{device_flags, ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::FormatDriver;
use instar_qcow2_driver::Qcow2;
use instar_qcow2_testkit::bitmaps::{BitmapSpec, Bits};
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::checker::View;
use instar_qcow2_testkit::pair::{commit_and_verify, data, verify_crashes, Pair};
use instar_qcow2_testkit::{be32, be64, config};

/// Commit, expect a refusal, and that nothing was changed.
fn refused(pair: &Pair) -> (ErrorCode, String) {
    let mut io = pair.io();
    let failure = pair.commit(&mut io).unwrap_err();
    assert!(matches!(failure.step, Step::Check | Step::Plan), "{:?}", failure.error);
    assert_eq!(io.log, vec![], "something was changed");
    (failure.error.code, failure.error.text)
}

/// How many bytes are missing, as a refusal says.
fn missing(pair: &Pair) -> usize {
    let (code, text) = refused(pair);
    assert_eq!(code, ErrorCode::NoSpace, "{text}");
    let number: String = text.chars().filter(char::is_ascii_digit).collect();
    assert!(text.contains("bytes are missing"), "{text}");
    number.parse().unwrap()
}

/// The smallest device that the commit fits on, from what the refusal of a smaller one says: there it must succeed, and with
/// one cluster less it must not.
fn fits_exactly(make: &dyn Fn(usize) -> Pair, image: usize, cluster: usize) -> usize {
    let smallest = image + missing(&make(image));
    let pair = make(smallest);
    let io = commit_and_verify(&pair);
    // Nothing was left unused.
    let end = &io.files[&DEVICE_OUTPUT];
    let view = View::new(end);
    assert_ne!(view.refcount((end.len() / cluster - 1) as u64), 0, "the last cluster is free");
    assert_eq!(missing(&make(smallest - cluster)), cluster);
    // A part of a cluster at the end of a device is no cluster.
    assert_eq!(missing(&make(smallest - 1)), 1);
    smallest
}

/// Refcount blocks are missing for what arrives: whole ones of every width, with every size of clusters.
#[test]
fn refcount_blocks_are_made() {
    for (bits, order) in [(9, 6), (9, 5), (9, 4), (9, 3), (10, 6), (12, 6), (12, 4), (16, 4)] {
        let per_block = (8u64 << bits) >> order;
        let count = (per_block + 70).min(9_000 >> (bits - 9)).min(400);
        let overlay = Spec::new(bits, 1000 << bits).with(data(100..100 + count, 0x40)).with([(3, State::Zero)]);
        let backing = Spec { refcount_order: order, ..Spec::new(bits, 1000 << bits) }.with(data([3, 5, 101], 0x80));
        let image = build(&backing).len();
        let make = |length: usize| Pair::new(&overlay, &backing).on_device(length);
        let smallest = fits_exactly(&make, image, 1 << bits);
        println!("{bits} {order}: {image} {smallest}");
    }
}

#[test]
fn the_refcount_table_grows_and_moves() {
    // 64 entries of blocks that describe 64 clusters each: 4,096 clusters.
    let overlay = Spec::new(9, 6_000 << 9).with(data(5_000..5_100, 0x40));
    let spec = |leaks| Spec { refcount_order: 6, leaks, ..Spec::new(9, 6_000 << 9) }.with(data([1, 5_001], 0x80));
    for leaks in [3_850, 3_900, 3_990] {
        let image = build(&spec(leaks)).len();
        let make = |length: usize| Pair::new(&overlay, &spec(leaks)).on_device(length);
        fits_exactly(&make, image, 512);
    }
    // Without a free cluster in front of the reach of the table, and not.
    let pair = Pair::new(&Spec::new(9, 6_000 << 9).with(data(5_000..5_040, 0x40)), &spec(3_990));
    let pair = pair.on_device(5 << 19);
    let io = commit_and_verify(&pair);
    assert!(be32(&io.files[&DEVICE_OUTPUT], 56) > 1, "the table did not grow");
    verify_crashes(&pair);
}

#[test]
fn every_crash_point() {
    for (bits, order, snapshots) in [(9, 6, 0), (9, 4, 1), (12, 4, 0)] {
        let overlay = Spec::new(bits - 1.min(bits - 9), 200 << bits)
            .with(data([1, 2, 40, 41, 42, 43, 120], 0x40))
            .with([(60, State::Zero), (63, State::Data(5))]);
        let backing = Spec { refcount_order: order, snapshots, free: 3, ..Spec::new(bits, 200 << bits) };
        let mut pair = Pair::new(&overlay, &backing.with(data([1, 20, 30], 0x80)));
        pair.ancestor = Some(build(&Spec::new(bits, 200 << bits).with(data(0..200, 0x77))));
        let length = pair.backing.len() + (100 << bits) + 100;
        let pair = pair.on_device(length);
        commit_and_verify(&pair);
        verify_crashes(&pair);
    }
}

/// Clusters that are free within the image go first, and the device need not be larger than the image.
#[test]
fn the_end_of_the_image_is_the_end_of_the_device() {
    for snapshots in [0, 1] {
        let overlay = Spec::new(12, 64 << 12).with(data([1, 2, 20], 0x40));
        let spec = |free| Spec { free, snapshots, ..Spec::new(12, 64 << 12) }.with(data([3, 30], 0x80));
        // With a snapshot, a copy of the L2 table.
        let wanted = 3 + snapshots as u64;
        let full = |free| {
            let pair = Pair::new(&overlay, &spec(free));
            let length = pair.backing.len();
            pair.on_device(length)
        };
        commit_and_verify(&full(wanted));
        verify_crashes(&full(30));
        assert_eq!(missing(&full(wanted - 1)), 4096);
        assert_eq!(missing(&full(0)), wanted as usize * 4096);
    }
}

/// Where a refcount block in the midst of the image is missing, what it would describe is free.
#[test]
fn clusters_that_no_block_describes_are_free() {
    // Blocks of 64 clusters; those of block 2 are given back, and its entry.
    let backing = Spec { refcount_order: 6, leaks: 400, ..Spec::new(9, 1000 << 9) }.with(data([3, 5], 0x80));
    let overlay = Spec::new(9, 1000 << 9).with(data(200..260, 0x40));
    let mut pair = Pair::new(&overlay, &backing);
    let table = be64(&pair.backing, 48) as usize;
    let block = be64(&pair.backing, table + 16);
    pair.backing[table + 16..table + 24].fill(0);
    // The block itself is a leak now.
    assert_ne!(block, 0);
    let length = pair.backing.len();
    let pair = pair.on_device(length);
    let io = commit_and_verify(&pair);
    assert_ne!(be64(&io.files[&DEVICE_OUTPUT], table + 16), 0, "there is no block for them");
    // A crash leaves leaks, which are not used again.
    verify_crashes(&pair.on_device(length + (100 << 9)));
}

#[test]
fn it_grows() {
    // The L1 table moves.
    let overlay = Spec::new(9, 5_000 << 9).with(data([1, 2, 4_990], 0x40));
    let backing = Spec { free: 3, ..Spec::new(9, 100 << 9) }.with(data([1, 30], 0x80));
    let make = |length: usize| Pair { resize: true, ..Pair::new(&overlay, &backing).on_device(length) };
    let image = build(&backing).len();
    let pair = make(image + (60 << 9));
    let io = commit_and_verify(&pair);
    assert_eq!(be64(&io.files[&DEVICE_OUTPUT], 24), 5_000 << 9);
    assert_ne!(be64(&io.files[&DEVICE_OUTPUT], 40), be64(&pair.backing, 40), "the L1 table did not move");
    verify_crashes(&pair);
    let lacking = missing(&make(image));
    assert!(lacking > 0 && lacking.is_multiple_of(512), "{lacking}");
    commit_and_verify(&make(image + lacking));
}

#[test]
fn bitmaps_are_kept_up() {
    let bitmaps = vec![BitmapSpec::new(2, 9, &[Bits::None]), BitmapSpec::new(2, 12, &[Bits::None])];
    let backing = Spec { bitmaps, autoclear: 1, refcount_order: 6, ..Spec::new(9, 2_000 << 9) };
    let backing = backing.with(data([1, 100], 0x80));
    let overlay = Spec::new(9, 2_000 << 9).with(data((0..2_000).step_by(150), 0x40));
    let pair = Pair::new(&overlay, &backing);
    let length = pair.backing.len() + (400 << 9);
    let pair = pair.on_device(length);
    commit_and_verify(&pair);
    verify_crashes(&pair);
    let overlay = Spec::new(9, 5_000 << 9).with(data([1, 4_900], 0x40));
    let pair = Pair { resize: true, ..Pair::new(&overlay, &backing).on_device(length) };
    commit_and_verify(&pair);
    verify_crashes(&pair);
}

/// Refcount 0 but in use: on a device nobody knows what else is in use.
#[test]
fn a_damaged_image_is_refused() {
    let overlay = Spec::new(12, 64 << 12).with(data([1, 2], 0x40));
    let mut pair = Pair::new(&overlay, &Spec::new(12, 64 << 12).with(data([3, 40], 0x80)));
    let l2 = be64(&pair.backing, be64(&pair.backing, 40) as usize) & 0x00ff_ffff_ffff_fe00;
    let host = be64(&pair.backing, l2 as usize + 40 * 8) & 0x00ff_ffff_ffff_fe00;
    let block = be64(&pair.backing, be64(&pair.backing, 48) as usize) as usize;
    let (whole, length) = (pair.backing.clone(), 40 << 12);
    pair.backing[block + (host >> 12) as usize * 2..][..2].fill(0);
    let (code, text) = refused(&pair.on_device(length));
    assert!(code == ErrorCode::BackingCorrupt && text.contains("refcount 0"), "{text}");
    // A table likewise: its first L2 table.
    let mut backing = whole;
    backing[block + (l2 >> 12) as usize * 2..][..2].fill(0);
    let pair = Pair { backing, ..Pair::new(&overlay, &Spec::new(12, 64 << 12)) };
    assert_eq!(refused(&pair.on_device(length)).0, ErrorCode::BackingCorrupt);
}

/// A device can become neither longer nor shorter: nobody asks it to.
#[test]
fn its_length_is_not_set() {
    let pair = Pair::new(&Spec::new(12, 64 << 12).with(data(1..9, 1)), &Spec::new(12, 64 << 12)).on_device(1 << 20);
    let mut io = pair.io();
    pair.commit(&mut io).unwrap();
    let set = |change: &&instar_guest_sdk::memory::Change| {
        matches!(change, instar_guest_sdk::memory::Change::SetLength { device: DEVICE_OUTPUT, .. })
    };
    assert_eq!(io.log.iter().find(set), None);
    let mut config = config(&io, DEVICE_OUTPUT);
    config.flags |= device_flags::FIXED_LENGTH;
    let mut again = MemoryDevices::new(io.files.clone());
    assert!(Qcow2::open_sink(&mut again, &config, false).is_ok());
}
