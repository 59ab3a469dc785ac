//! Disks in several files that grow: content, and every state that a power loss can leave.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{device_flags, DeviceConfig, DeviceRole, ErrorCode, FileDevice, FileList, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::resize::{resize, Options, ResizeFailure, Step};
use instar_guest_sdk::FormatDriver;
use instar_guest_view::Ancestors;
use instar_vmdk_driver::Vmdk;
use instar_vmdk_testkit::crashes;
use instar_vmdk_testkit::pair::Files;
use instar_vmdk_testkit::{build, Spec, State, View, GRAIN};

const FIRST: usize = 700 * GRAIN;
const SECOND: usize = 100 * GRAIN + 512;
const EXTENTS: [u32; 2] = [19, 20];
/// Where a flat extent begins in its file.
const FLAT_AT: usize = 1536;

/// A text of at least `bytes` bytes, with these lines.
fn descriptor(kind: &str, lines: &[String], bytes: usize) -> Vec<u8> {
    let sectors: u64 = lines.iter().map(|line| line.split(' ').nth(1).unwrap().parse::<u64>().unwrap()).sum();
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000005\nparentCID=ffffffff\ncreateType=\"{kind}\"\n# Extent description\n{}\n\
         # The Disk Data Base\nddb.geometry.cylinders = \"{}\"\nddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\n",
        lines.join("\n"),
        sectors / (16 * 63)
    );
    let more = bytes.saturating_sub(text.len());
    (text + &"# more\n".repeat(more.div_ceil(7))).into_bytes()
}

/// A sparse extent and, behind it, a sparse or a flat one.
fn disk(flat: bool, kind: &str, text: usize) -> Files {
    let grains = |grains: &[usize], seed| grains.iter().map(|&grain| (grain, State::Data(seed))).collect::<Vec<_>>();
    let first = Spec::new(FIRST, 5, u32::MAX).with(grains(&[0, 1, 600, 699], 0x40));
    let second = Spec::new(SECOND, 5, u32::MAX).with(grains(&[0, 50, 100], 0x41));
    let mut file = vec![0x33; FLAT_AT + SECOND + 700];
    file[FLAT_AT + 5] = 1;
    let last = if flat {
        (format!("RW {} FLAT \"y\" {}", SECOND / 512, FLAT_AT / 512), file)
    } else {
        (format!("RW {} SPARSE \"y\"", SECOND / 512), build(&second))
    };
    let lines = [format!("RW {} SPARSE \"x\"", FIRST / 512), last.0];
    [(DEVICE_OUTPUT, descriptor(kind, &lines, text)), (EXTENTS[0], build(&first)), (EXTENTS[1], last.1)].into()
}

/// The sectors of the last extent, as the descriptor says; the text is whole.
fn said(files: &Files) -> usize {
    let text = String::from_utf8_lossy(&files[&DEVICE_OUTPUT]).into_owned();
    let text = text.split('\0').next().unwrap().to_owned();
    assert!(text.starts_with("# Disk DescriptorFile\nversion=1\nCID=00000005\n"), "{text}");
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("RW ")).collect();
    assert_eq!((lines.len(), text.matches("ddb.geometry.sectors = \"63\"").count()), (2, 1), "{text}");
    lines[1].split(' ').nth(1).unwrap().parse().unwrap()
}

/// What a guest reads: of a sparse extent, its header gives the length.
fn content(files: &Files) -> Vec<u8> {
    let mut all = View::new(&files[&EXTENTS[0]]).content(&[]);
    let (last, length) = (&files[&EXTENTS[1]], said(files) * 512);
    if last.starts_with(b"KDMV") {
        let view = View::new(last);
        assert!(view.size <= length, "the header says more than the descriptor");
        view.assert_consistent();
        all.extend(view.content(&[]));
    } else {
        all.extend(&last[FLAT_AT..FLAT_AT + length]);
    }
    all
}

fn run(io: &mut MemoryDevices, size: usize) -> Result<u64, ResizeFailure> {
    let at = |error| ResizeFailure { step: Step::Plan, error };
    let describe = |device: u32| FileDevice {
        flags: device_flags::PRESENT,
        device,
        file_length: io.files[&device].len() as u64,
        max_length: u64::MAX,
    };
    let main = describe(DEVICE_OUTPUT);
    let target = DeviceConfig {
        device: DEVICE_OUTPUT,
        file_length: main.file_length,
        max_length: main.max_length,
        virtual_size: content(&io.files).len() as u64,
        cluster_size: GRAIN as u64,
        files: FileList::of(Box::leak(Box::new(EXTENTS.map(describe)))),
        ..DeviceConfig::default()
    };
    io.hold([(DeviceRole::Target, &target)]);
    let mut sink = Vmdk::open_sink(io, &target, false).map_err(at)?;
    let options = Options { virtual_size: size as u64, ..Options::default() };
    resize(io, &mut sink, &mut Ancestors::new(Vec::new()), options, &mut |_| {})
}

/// Grow a disk, and look at what each power loss leaves.
fn grows(before: &Files, size: usize) {
    let old = content(before);
    let mut new = old.clone();
    new.resize(size, 0);
    let mut io = MemoryDevices::new(before.clone());
    assert_eq!(run(&mut io, size).unwrap(), size as u64);
    assert!(io.unflushed().is_empty());
    let finished = |files: &Files| {
        assert!(content(files) == new, "another content");
        assert_eq!(said(files), (size - FIRST) / 512);
    };
    finished(&io.files);
    let log = io.log;
    let mut seen = [0, 0];
    crashes().each(before, &log, &mut |files| {
        let now = content(&files);
        assert!(now == old || now == new, "neither the old disk nor the new one");
        seen[usize::from(now == new)] += 1;
        let mut io = MemoryDevices::new(files);
        run(&mut io, size).unwrap();
        finished(&io.files);
    });
    assert!(seen.iter().all(|&states| states > 0), "{seen:?}");
}

#[test]
fn the_last_extent_becomes_larger() {
    for flat in [false, true] {
        let before = disk(flat, "twoGbMaxExtentSparse", 0);
        for size in [FIRST + SECOND + 512, FIRST + 300 * GRAIN, FIRST + 1500 * GRAIN + 512] {
            grows(&before, size);
        }
    }
}

/// A text of several sectors is changed within one of them: what a comment had makes room for more digits.
#[test]
fn the_text_of_several_sectors_is_changed_in_one() {
    for flat in [false, true] {
        grows(&disk(flat, "twoGbMaxExtentFlat", 1200), FIRST + 2000 * GRAIN);
    }
    let mut plain = disk(true, "twoGbMaxExtentFlat", 1200);
    let text = String::from_utf8(plain[&DEVICE_OUTPUT].clone()).unwrap();
    let bare = text.replace("# Extent description\n", "").replace("# The Disk Data Base\n", "");
    // Nothing in the sector of the extent could make room, and the rest would move.
    let bare = bare.replace("# more\n", "more=1\n");
    plain.insert(DEVICE_OUTPUT, bare.clone().into_bytes());
    let mut io = MemoryDevices::new(plain.clone());
    let failure = run(&mut io, FIRST + 20000 * GRAIN).unwrap_err();
    assert!(
        failure.error.code == ErrorCode::UnsupportedFormat && failure.error.text.contains("put a comment line of 7")
    );
    assert!(io.log.is_empty());
    // What the message says helps.
    plain.insert(DEVICE_OUTPUT, bare.replacen("RW ", "#123456\nRW ", 1).into_bytes());
    run(&mut MemoryDevices::new(plain), FIRST + 20000 * GRAIN).unwrap();
}

#[test]
fn extents_of_two_gibibytes_are_full() {
    let before = disk(true, "twoGbMaxExtentFlat", 0);
    let mut io = MemoryDevices::new(before.clone());
    let failure = run(&mut io, FIRST + (2 << 30) + 512).unwrap_err();
    assert!(failure.error.text.contains("extents have 2 GiB at most"), "{}", failure.error.text);
    assert!(io.log.is_empty() && io.files == before);
}
