//! The commit over disks in several files: content, and every crash point.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::{commit, Commit, CommitFailure, Options, Outcome, Step};
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, FileDevice, FileList, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::FormatDriver;
use instar_guest_view::Ancestors;
use instar_vmdk_driver::Vmdk;
use instar_vmdk_format::next_content_id;
use instar_vmdk_testkit::crashes;
use instar_vmdk_testkit::pair::{Files, OVERLAY};
use instar_vmdk_testkit::{build, Spec, State, View, GRAIN};

const FIRST: usize = 700 * GRAIN;
const SECOND: usize = 100 * GRAIN + 512;
const SIZE: usize = FIRST + SECOND;
/// The extents of the overlay, and those of the backing.
const TOP: [u32; 2] = [17, 18];
const BASE: [u32; 2] = [19, 20];
/// Where the flat extent begins in its file.
const FLAT_AT: usize = 1536;

fn descriptor(cid: u32, parent: u32, kind: &str, lines: [String; 2]) -> Vec<u8> {
    let [first, second] = lines;
    format!(
        "version=1\nCID={cid:08x}\nparentCID={parent:08x}\ncreateType=\"{kind}\"\nparentFileNameHint=\"b\"\n{first}\n{second}\n"
    )
    .into_bytes()
}

fn sparse(sizes: [usize; 2]) -> [String; 2] {
    sizes.map(|size| format!("RW {} SPARSE \"x\"", size / 512))
}

fn data(grains: impl IntoIterator<Item = usize>, seed: u8) -> Vec<(usize, State)> {
    grains.into_iter().map(|grain| (grain, State::Data(seed))).collect()
}

/// An overlay in two sparse extents over a backing of a sparse and a flat one.
fn disks(lazy_tables: bool) -> Files {
    let top = [
        Spec::new(FIRST, 7, 5).with(data([0, 1, 600, 699], 0x40)),
        Spec::new(SECOND, 7, 5).with(data([0, 50, 100], 0x41)).with([(3, State::Zero)]),
    ];
    let base = Spec { lazy_tables, ..Spec::new(FIRST, 5, u32::MAX) }.with(data([1, 30], 0x80));
    let flat = format!("RW {} FLAT \"y\" {}", SECOND / 512, FLAT_AT / 512);
    let mut file = vec![0x33; FLAT_AT + SECOND + 700];
    file[FLAT_AT + 5] = 1;
    [
        (OVERLAY, descriptor(7, 5, "twoGbMaxExtentSparse", sparse([FIRST, SECOND]))),
        (TOP[0], build(&top[0])),
        (TOP[1], build(&top[1])),
        (DEVICE_OUTPUT, descriptor(5, u32::MAX, "twoGbMaxExtentFlat", [sparse([FIRST, 0])[0].clone(), flat])),
        (BASE[0], build(&base)),
        (BASE[1], file),
    ]
    .into()
}

fn config(files: &Files, device: u32, extents: [u32; 2]) -> DeviceConfig {
    let describe = |device: u32| FileDevice {
        flags: device_flags::PRESENT,
        device,
        file_length: files[&device].len() as u64,
        max_length: u64::MAX,
    };
    let main = describe(device);
    DeviceConfig {
        device,
        file_length: main.file_length,
        max_length: main.max_length,
        virtual_size: SIZE as u64,
        cluster_size: GRAIN as u64,
        files: FileList::of(Box::leak(Box::new(extents.map(describe)))),
        ..DeviceConfig::default()
    }
}

fn run(io: &mut MemoryDevices) -> Result<Outcome, CommitFailure> {
    let at = |error| CommitFailure { step: Step::Check, error };
    let (top, base) = (config(&io.files, OVERLAY, TOP), config(&io.files, DEVICE_OUTPUT, BASE));
    io.hold_commit(&top, false, &base);
    let mut source = Vmdk::open_source(io, &top).map_err(at)?;
    let mut sink = Vmdk::open_sink(io, &base, false).map_err(at)?;
    let mut below = Ancestors::new(Vec::new());
    let mut images = Commit { source: &mut source, sink: &mut sink, below: &mut below };
    commit(io, &mut images, Options::default(), &mut |_| {})
}

/// What backing and overlay read as.
fn views(files: &Files) -> (Vec<u8>, Vec<u8>) {
    let mut backing = View::new(&files[&BASE[0]]).content(&[]);
    backing.extend_from_slice(&files[&BASE[1]][FLAT_AT..FLAT_AT + SECOND]);
    let mut overlay = View::new(&files[&TOP[0]]).content(&backing[..FIRST]);
    overlay.extend(View::new(&files[&TOP[1]]).content(&backing[FIRST..]));
    (backing, overlay)
}

fn id(file: &[u8], key: &str) -> u32 {
    let text = String::from_utf8_lossy(file).into_owned();
    u32::from_str_radix(text.lines().find_map(|line| line.strip_prefix(key)).unwrap(), 16).unwrap()
}

fn assert_consistent(files: &Files) {
    for device in [TOP[0], TOP[1], BASE[0]] {
        View::new(&files[&device]).assert_consistent();
    }
    let (parent, cid) = (id(&files[&OVERLAY], "parentCID="), id(&files[&DEVICE_OUTPUT], "CID="));
    assert!(
        parent == cid || parent == next_content_id(cid, Some(id(&files[&OVERLAY], "CID="))),
        "{parent:08x} {cid:08x}"
    );
}

fn assert_finished(files: &Files, wanted: &[u8], before: &Files) {
    let (backing, overlay) = views(files);
    assert!(backing == wanted, "the backing reads wrong");
    assert!(overlay == wanted, "the overlay reads wrong");
    assert_consistent(files);
    assert!(TOP.iter().all(|device| View::new(&files[device]).held() == 0));
    assert_eq!(id(&files[&OVERLAY], "parentCID="), id(&files[&DEVICE_OUTPUT], "CID="));
    let (flat, was) = (&files[&BASE[1]], &before[&BASE[1]]);
    assert_eq!(flat.len(), was.len());
    assert!(
        flat[..FLAT_AT] == was[..FLAT_AT] && flat[FLAT_AT + SECOND..] == was[FLAT_AT + SECOND..],
        "outside the extent"
    );
}

#[test]
fn every_crash_leaves_the_overlay_as_it_was() {
    for lazy_tables in [false, true] {
        let before = disks(lazy_tables);
        let wanted = views(&before).1;
        let mut io = MemoryDevices::new(before.clone());
        let outcome = run(&mut io).unwrap();
        assert_eq!((outcome.clusters_committed, outcome.overlay_clusters_cleared), (8, 8));
        assert_finished(&io.files, &wanted, &before);
        let log = io.log;
        let states = crashes().each(&before, &log, &mut |files| {
            assert!(views(&files).1 == wanted, "the overlay changed its content");
            assert_consistent(&files);
            let mut io = MemoryDevices::new(files);
            run(&mut io).unwrap();
            assert_finished(&io.files, &wanted, &before);
        });
        assert!(states > 1);
        println!("crash states: {states}");
    }
}

#[test]
fn what_the_host_saw_must_still_be_there() {
    type Change = fn(&mut Files);
    let cases: [(&str, ErrorCode, Change); 5] = [
        ("the host saw 2", ErrorCode::HeaderMismatch, |files| {
            let text = files.get_mut(&DEVICE_OUTPUT).unwrap();
            text.extend_from_slice(b"RW 1 FLAT \"z\" 0\n");
        }),
        ("too short", ErrorCode::BackingCorrupt, |files| {
            files.get_mut(&BASE[1]).unwrap().truncate(FLAT_AT + SECOND - 1)
        }),
        ("the descriptor says", ErrorCode::BackingCorrupt, |files| {
            let other = build(&Spec::new(FIRST + GRAIN, 5, u32::MAX));
            files.insert(BASE[0], other);
        }),
        ("the magic", ErrorCode::OverlayCorrupt, |files| files.get_mut(&TOP[1]).unwrap()[0] = 0),
        ("the host saw", ErrorCode::HeaderMismatch, |files| {
            let one = files[&TOP[0]].clone();
            files.insert(OVERLAY, one);
        }),
    ];
    for (words, code, change) in cases {
        let mut files = disks(false);
        change(&mut files);
        let mut io = MemoryDevices::new(files.clone());
        let failure = run(&mut io).unwrap_err();
        assert_eq!(failure.error.code, code, "{words}: {}", failure.error.text);
        assert!(failure.error.text.contains(words), "{}", failure.error.text);
        assert!(io.files == files, "{words}: something changed");
    }
}
