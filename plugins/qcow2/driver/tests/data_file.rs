//! The commit over images with data files: content, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::{commit, Commit, CommitFailure, Options, Outcome, Step};
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, FileDevice, FileList, DEVICE_OUTPUT};
use instar_guest_sdk::crash::Files;
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::FormatDriver;
use instar_guest_view::Ancestors;
use instar_qcow2_driver::Qcow2;
use instar_qcow2_testkit::builder::{build, build_outside, Spec, State};
use instar_qcow2_testkit::checker::{check, content, content_outside, View};
use instar_qcow2_testkit::pair::{data, is_dirty};
use instar_qcow2_testkit::{be64, config, ANCESTOR, OVERLAY};
use instar_testkit::crashes;

/// The data files of the overlay, and of the backing.
const TOP: u32 = 17;
const BASE: u32 = 18;

fn of(io: &MemoryDevices, device: u32, file: u32, longest: u64) -> DeviceConfig {
    let files = io.files.get(&file).map(|bytes| FileDevice {
        flags: device_flags::PRESENT,
        device: file,
        file_length: bytes.len() as u64,
        max_length: longest.max(bytes.len() as u64),
    });
    let files: Vec<FileDevice> = files.into_iter().collect();
    DeviceConfig { files: FileList::of(files.leak()), ..config(io, device) }
}

/// The images of `files`; the backing grows if it has to.
fn run(io: &mut MemoryDevices) -> Result<Outcome, CommitFailure> {
    let at = |error| CommitFailure { step: Step::Check, error };
    let longest = be64(&io.files[&OVERLAY], 24).max(be64(&io.files[&DEVICE_OUTPUT], 24));
    let (top, base) = (of(io, OVERLAY, TOP, 0), of(io, DEVICE_OUTPUT, BASE, longest));
    io.hold_commit(&top, false, &base);
    let ancestor = io.files.contains_key(&ANCESTOR).then(|| config(io, ANCESTOR));
    let mut source = Qcow2::open_source(io, &top).map_err(at)?;
    let mut sink = Qcow2::open_sink(io, &base, ancestor.is_some()).map_err(at)?;
    let mut layers: Vec<Box<dyn instar_guest_sdk::Source>> = Vec::new();
    if let Some(ancestor) = ancestor {
        layers.push(Box::new(Qcow2::open_source(io, &ancestor).map_err(at)?));
    }
    let mut below = Ancestors::new(layers);
    let mut images = Commit { source: &mut source, sink: &mut sink, below: &mut below };
    commit(io, &mut images, Options { resize_backing: true, ..Options::default() }, &mut |_| {})
}

fn seen(files: &Files, device: u32, file: u32, below: Option<&[u8]>) -> Vec<u8> {
    match files.get(&file) {
        Some(data) => content_outside(&files[&device], data, below),
        None => content(&files[&device], below),
    }
}

/// What backing and overlay read as.
fn views(files: &Files) -> (Vec<u8>, Vec<u8>) {
    let below = files.get(&ANCESTOR).map(|bytes| content(bytes, None));
    let backing = seen(files, DEVICE_OUTPUT, BASE, below.as_deref());
    let overlay = seen(files, OVERLAY, TOP, Some(&backing));
    (backing, overlay)
}

fn assert_consistent(files: &Files) {
    for device in [OVERLAY, DEVICE_OUTPUT] {
        assert!(is_dirty(&files[&device]) || check(&files[&device]).errors.is_empty(), "{:?}", check(&files[&device]));
    }
}

/// Whether the backing's data file is to be read by itself.
fn is_raw(files: &Files) -> bool {
    files.contains_key(&BASE) && be64(&files[&DEVICE_OUTPUT], 88) & 2 != 0
}

fn verify(files: impl IntoIterator<Item = (u32, Vec<u8>)>) {
    let before = Files::from_iter(files);
    let (mut wanted, overlay) = views(&before);
    wanted.resize(wanted.len().max(overlay.len()), 0);
    wanted[..overlay.len()].copy_from_slice(&overlay);
    let finished = |files: &Files| {
        assert!(views(files) == (wanted.clone(), overlay.clone()), "something reads wrong");
        assert_consistent(files);
        assert_eq!(is_raw(files), is_raw(&before));
        if is_raw(files) {
            assert!(files[&BASE] == wanted, "the data file does not read as the disk");
        }
        assert!(View::new(&files[&OVERLAY]).entries().is_empty());
        if let Some(data) = files.get(&TOP) {
            assert_eq!(data.len(), before[&TOP].len());
            assert!(data.iter().all(|&byte| byte == 0), "space is not given back");
        }
    };
    let mut io = MemoryDevices::new(before.clone());
    run(&mut io).unwrap();
    finished(&io.files);
    let states = crashes().each_again(&before, &io.log, &mut |files| {
        assert!(views(&files).1 == overlay, "the overlay changed its content");
        assert_consistent(&files);
        let mut io = MemoryDevices::new(files);
        run(&mut io).unwrap();
        finished(&io.files);
        io.log
    });
    assert!(states > 10, "only {states} states");
}

fn overlay() -> Spec {
    Spec::new(9, (40 << 9) - 512).with(data([0, 1, 5, 20, 38], 0x21)).with([
        (2, State::Zero),
        (3, State::ZeroAllocated(9)),
        (7, State::Zero),
        (21, State::Zero),
    ])
}

fn backing(bits: u32) -> Spec {
    let mut spec = Spec::new(bits, 41 << 9).with(data([0, 2], 0x43));
    spec.clusters.extend([(1, State::Zero), (3, State::ZeroAllocated(7))]);
    spec
}

#[test]
fn a_backing_whose_clusters_are_larger_or_smaller() {
    for bits in [9, 10, 12] {
        let [image, data] = build_outside(&backing(bits), false);
        verify([(OVERLAY, build(&overlay())), (DEVICE_OUTPUT, image), (BASE, data)]);
    }
}

#[test]
fn an_overlay_with_a_data_file() {
    let [image, data] = build_outside(&overlay(), false);
    verify([(OVERLAY, image.clone()), (TOP, data.clone()), (DEVICE_OUTPUT, build(&backing(10)))]);
    let [base, base_data] = build_outside(&backing(11), false);
    verify([(OVERLAY, image), (TOP, data), (DEVICE_OUTPUT, base), (BASE, base_data)]);
}

#[test]
fn zeroes_reach_a_raw_data_file() {
    for bits in [9, 11] {
        let mut spec = Spec::new(bits, 41 << 9).with(data([0, 2, 3], 0x43));
        spec.clusters.insert(1, State::Zero);
        let [image, data] = build_outside(&spec, true);
        verify([(OVERLAY, build(&overlay())), (DEVICE_OUTPUT, image), (BASE, data)]);
    }
}

#[test]
fn what_lies_below_is_copied_over_stale_bytes() {
    let [image, bytes] = build_outside(&backing(11), false);
    let ancestor = Spec::new(9, 30 << 9).with(data(0..25, 0x66));
    verify([(OVERLAY, build(&overlay())), (DEVICE_OUTPUT, image), (BASE, bytes), (ANCESTOR, build(&ancestor))]);
}

#[test]
fn subclusters_in_a_data_file() {
    let mixed = [(0, State::Mixed(0x71, 0xff00, 0xff)), (1, State::MixedZero(0xf0f)), (2, State::Data(5))];
    let overlay = Spec { extended: true, ..Spec::new(14, (4 << 14) - 1024) }.with(mixed);
    let below = [(0, State::Mixed(0x17, 0xf, 0xf0)), (2, State::Mixed(4, 0xffff, 0)), (3, State::Data(9))];
    let base = Spec { extended: true, ..Spec::new(14, 4 << 14) }.with(below);
    for raw in [false, true] {
        let [image, data] = build_outside(&base, raw);
        if raw {
            // What is not allocated reads as zeroes there.
            let content = content_outside(&image, &data, None);
            verify([(OVERLAY, build(&overlay)), (DEVICE_OUTPUT, image), (BASE, content)]);
        } else {
            let [top, top_data] = build_outside(&overlay, false);
            verify([(OVERLAY, top), (TOP, top_data), (DEVICE_OUTPUT, image), (BASE, data)]);
        }
    }
}

#[test]
fn a_backing_that_grows_and_a_data_file_that_is_short_or_long() {
    let short = (10 << 9) - 512;
    for (raw, length) in [(false, 0), (false, 700), (false, 100 << 9), (true, short), (true, 30 << 9)] {
        let spec = Spec::new(9, short as u64).with(data([0], 0x43));
        let [image, mut bytes] = build_outside(&spec, raw);
        bytes.resize(length, 0xd5);
        let overlay = Spec::new(9, 70 << 9).with(data([9, 69], 0x21));
        verify([(OVERLAY, build(&overlay)), (DEVICE_OUTPUT, image), (BASE, bytes)]);
    }
}

#[test]
fn what_contradicts_itself_is_refused_and_nothing_changes() {
    type Edit = fn(&mut Vec<u8>, usize);
    let l2 = |bytes: &[u8]| (be64(bytes, be64(bytes, 40) as usize) & !(1 << 63)) as usize;
    let cases: [(Edit, ErrorCode, &str); 5] = [
        // Another cluster's place, a compressed cluster, snapshots, raw over a backing file, and another number of files.
        (|b, l2| b[l2 + 6] = 2, ErrorCode::BackingCorrupt, "where only that guest offset"),
        (|b, l2| b[l2] = 0x40, ErrorCode::BackingCorrupt, "compressed"),
        (|b, _| b[63] = 1, ErrorCode::ExternalDataFile, "snapshots"),
        (
            |b, _| {
                b[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0x80, 0, 0, 0, 4]);
                b[95] = 2;
            },
            ErrorCode::ExternalDataFile,
            "data_file_raw",
        ),
        (|b, _| b[79] = 0, ErrorCode::HeaderMismatch, "another data file"),
    ];
    for (edit, code, words) in cases {
        let [mut image, bytes] = build_outside(&backing(9), false);
        let at = l2(&image);
        edit(&mut image, at);
        // The table of snapshots would have to be somewhere.
        if words == "snapshots" {
            image[71 - 1] = 2;
        }
        let mut io = MemoryDevices::new([(OVERLAY, build(&overlay())), (DEVICE_OUTPUT, image), (BASE, bytes)]);
        let failure = run(&mut io).unwrap_err();
        assert_eq!(failure.error.code, code, "{}", failure.error);
        assert!(failure.error.text.contains(words), "{}", failure.error);
        assert_eq!(io.log, vec![]);
    }
}

#[test]
fn a_data_file_that_cannot_grow_is_refused_first() {
    let [image, mut bytes] = build_outside(&Spec::new(9, 41 << 9), false);
    bytes.truncate(38 << 9);
    let mut io = MemoryDevices::new([(OVERLAY, build(&overlay())), (DEVICE_OUTPUT, image), (BASE, bytes)]);
    let (top, base) = (of(&io, OVERLAY, TOP, 0), of(&io, DEVICE_OUTPUT, BASE, 0));
    io.hold_commit(&top, false, &base);
    let (mut source, mut sink) =
        (Qcow2::open_source(&mut io, &top).unwrap(), Qcow2::open_sink(&mut io, &base, false).unwrap());
    let mut below = Ancestors::new(Vec::new());
    let mut images = Commit { source: &mut source, sink: &mut sink, below: &mut below };
    let failure = commit(&mut io, &mut images, Options::default(), &mut |_| {}).unwrap_err();
    assert_eq!((failure.error.code, io.log), (ErrorCode::NoSpace, vec![]));
}
