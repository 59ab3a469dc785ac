//! What arrives at a disk: parts of sectors, more than fits between two flushes, devices that cannot become longer.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, Phase, DEVICE_OUTPUT};
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_guest_sdk::{BlockIo, DriverResult, Extent, FormatDriver, ReadBelow, Sink};
use instar_vhd_driver::Vhd;
use instar_vhd_testkit::{build, device, Kind, Spec, View};

const SIZE: usize = 40 * 8192;

/// What is below, the same byte everywhere.
struct Below;

impl ReadBelow for Below {
    fn exists(&self) -> bool {
        true
    }

    fn read(&mut self, _: &mut dyn BlockIo, _: u64, buffer: &mut [u8]) -> DriverResult<()> {
        buffer.fill(0xb0);
        Ok(())
    }
}

/// The file after these extents arrived, and what it read as before and afterwards.
fn written(spec: &Spec, extents: &[Extent], data: &[u8], fixed_length: bool) -> (MemoryDevices, Vec<u8>, Vec<u8>) {
    let bytes = build(spec);
    let below = vec![0xb0; if spec.kind == Kind::Differencing { SIZE } else { 0 }];
    let before = View::new(&bytes).content(&below);
    let mut config = DeviceConfig { device: DEVICE_OUTPUT, ..device(DEVICE_OUTPUT, &bytes, 1 << 30) };
    if fixed_length {
        config.flags |= device_flags::FIXED_LENGTH;
        config.max_length = config.file_length;
    }
    let mut io = MemoryDevices::new([(0, data.to_vec()), (DEVICE_OUTPUT, bytes)]);
    let mut sink = Vhd::open_sink(&mut io, &config, true).unwrap();
    sink.plan(&mut io, extents).unwrap();
    let plan = sink.planned(&mut io).unwrap();
    io.enter(Phase::Target);
    sink.write(&mut io, extents, &mut Below).unwrap();
    sink.finish(&mut io).unwrap();
    let file = &io.files[&DEVICE_OUTPUT];
    assert!(file.len() as u64 <= plan.final_length, "{} bytes, {} were planned", file.len(), plan.final_length);
    assert_eq!(View::new(file).fault(), None);
    assert!(View::new(file).is_whole() && io.unflushed().is_empty());
    let after = View::new(file).content(&below);
    (io, before, after)
}

fn expected(before: &[u8], extents: &[Extent], data: &[u8]) -> Vec<u8> {
    let mut disk = before.to_vec();
    for extent in extents {
        let (start, end) = (extent.guest_offset as usize, extent.end() as usize);
        match extent.content {
            instar_guest_sdk::Content::Data { offset, .. } => {
                disk[start..end].copy_from_slice(&data[offset as usize..offset as usize + end - start]);
            }
            _ => disk[start..end].fill(0),
        }
    }
    disk
}

fn specs() -> Vec<Spec> {
    let runs = [(0, 3, 0x43), (16, 16, 0x44), (40, 1, 0x45), (600, 40, 0x46)];
    [Kind::Dynamic, Kind::Differencing, Kind::Fixed]
        .into_iter()
        .flat_map(|kind| {
            [false, true].map(|batmap| Spec { batmap, garbage: 0x99, ..Spec::new(kind, SIZE, 8192) }.with(runs))
        })
        .collect()
}

#[test]
fn parts_of_sectors_are_filled_up() {
    let data: Vec<u8> = (0..200_000u32).map(|at| (at / 3) as u8 | 1).collect();
    let extents = [
        Extent::data(1000, 100, 0, 5),
        // Three in one sector, one after the other.
        Extent::data(2048 + 3, 10, 0, 300),
        Extent::zero(2048 + 13, 100),
        Extent::data(2048 + 113, 200, 0, 500),
        // From the middle of a sector that is there to the middle of one that is not.
        Extent::data(40 * 512 + 7, 512, 0, 900),
        Extent::zero(8192 * 7 + 1, 8192 * 2),
        Extent::data(8192 * 20 + 511, 8192 * 3 + 2, 0, 2000),
        Extent::data(SIZE as u64 - 5, 5, 0, 9),
    ];
    for spec in specs() {
        let (_, before, after) = written(&spec, &extents, &data, false);
        assert!(after == expected(&before, &extents, &data), "{spec:?}");
    }
}

#[test]
fn more_than_is_collected_at_once() {
    let data: Vec<u8> = (0..SIZE).map(|at| (at / 5) as u8 | 1).collect();
    // Every other sector: as many requests as there are sectors, in blocks that several groups have a part in.
    let size = 24 << 20;
    let extents: Vec<Extent> =
        (0..size / 1024).map(|at| Extent::data(at * 1024, 512, 0, at * 512 % (SIZE as u64 - 512))).collect();
    for (kind, block) in [(Kind::Differencing, 4 << 20), (Kind::Dynamic, 4 << 20), (Kind::Differencing, 65536)] {
        let spec = Spec::new(kind, size as usize, block).with([(5, 100, 7)]);
        let bytes = build(&spec);
        let below = vec![0; size as usize];
        let before = View::new(&bytes).content(&below);
        let config = DeviceConfig { device: DEVICE_OUTPUT, ..device(DEVICE_OUTPUT, &bytes, 1 << 30) };
        let mut io = MemoryDevices::new([(0, data.clone()), (DEVICE_OUTPUT, bytes)]);
        let mut sink = Vhd::open_sink(&mut io, &config, true).unwrap();
        sink.plan(&mut io, &extents).unwrap();
        sink.planned(&mut io).unwrap();
        io.enter(Phase::Target);
        struct Nothing;
        impl ReadBelow for Nothing {
            fn exists(&self) -> bool {
                false
            }
            fn read(&mut self, _: &mut dyn BlockIo, _: u64, buffer: &mut [u8]) -> DriverResult<()> {
                buffer.fill(0);
                Ok(())
            }
        }
        sink.write(&mut io, &extents, &mut Nothing).unwrap();
        sink.finish(&mut io).unwrap();
        let view = View::new(&io.files[&DEVICE_OUTPUT]);
        assert_eq!(view.fault(), None);
        assert!(view.content(&below) == expected(&before, &extents, &data), "{kind:?} {block}");
        let flushes = io.log.iter().filter(|change| matches!(change, Change::Flush { .. })).count();
        assert!(flushes > 4, "in several groups: {flushes} flushes");
    }
}

/// A disk of XenServer on a volume: its footer is at the volume's end, and stays there.
#[test]
fn on_a_device_blocks_go_before_the_footer_and_are_zeroed_first() {
    let data = vec![7; 8192];
    for kind in [Kind::Dynamic, Kind::Differencing] {
        let spec = Spec { batmap: true, tail: false, ..Spec::new(kind, SIZE, 8192) }.with([(0, 3, 0x43)]);
        // What the volume held before is still there.
        let mut bytes = build(&spec);
        let footer = bytes[..512].to_vec();
        bytes.resize(bytes.len() + 6 * 8704, 0xee);
        bytes.extend(&footer);
        let below = vec![0xb0; if kind == Kind::Differencing { SIZE } else { 0 }];
        let before = View::new(&bytes).content(&below);
        let mut config = DeviceConfig { device: DEVICE_OUTPUT, ..device(DEVICE_OUTPUT, &bytes, bytes.len() as u64) };
        config.flags |= device_flags::FIXED_LENGTH;
        let length = bytes.len();
        let extents = [Extent::data(5000, 100, 0, 0), Extent::data(8192 * 9, 512, 0, 0), Extent::zero(8192 * 12, 512)];
        let mut io = MemoryDevices::new([(0, data.clone()), (DEVICE_OUTPUT, bytes)]);
        let mut sink = Vhd::open_sink(&mut io, &config, true).unwrap();
        sink.plan(&mut io, &extents).unwrap();
        assert_eq!(sink.planned(&mut io).unwrap().final_length, length as u64);
        io.enter(Phase::Target);
        sink.write(&mut io, &extents, &mut Below).unwrap();
        sink.finish(&mut io).unwrap();
        let file = &io.files[&DEVICE_OUTPUT];
        assert_eq!((file.len(), &file[length - 512..]), (length, &footer[..]));
        assert!(View::new(file).content(&below) == expected(&before, &extents, &data), "{kind:?}");
        // More than there is room for is refused by the plan.
        let mut sink = Vhd::open_sink(&mut io, &config, true).unwrap();
        let all = [Extent::data(0, SIZE as u64, 0, 0)];
        sink.plan(&mut io, &all).unwrap();
        assert_eq!(sink.planned(&mut io).unwrap_err().code, ErrorCode::UnsupportedFormat);
    }
}

#[test]
fn what_the_host_saw_must_still_be_there() {
    let bytes = build(&Spec::new(Kind::Dynamic, SIZE, 8192));
    let config = device(0, &bytes, u64::MAX);
    for changed in [
        DeviceConfig { virtual_size: config.virtual_size + 512, ..config },
        DeviceConfig { cluster_size: config.cluster_size * 2, ..config },
    ] {
        let mut io = MemoryDevices::new([(0, bytes.clone())]);
        assert_eq!(Vhd::open_source(&mut io, &changed).unwrap_err().code, ErrorCode::HeaderMismatch);
    }
}

#[test]
fn a_sink_that_lacks_memory_or_room_says_so_before_anything_changes() {
    let bytes = build(&Spec::new(Kind::Dynamic, SIZE, 8192));
    for (heap, longest, code) in [
        (Some(1 << 20), 1 << 30, ErrorCode::ScratchTooSmall),
        (None, bytes.len() as u64 + 100, ErrorCode::UnsupportedFormat),
    ] {
        let mut io = MemoryDevices::new([(0, vec![7; SIZE]), (DEVICE_OUTPUT, bytes.clone())]);
        io.heap = heap;
        let config = DeviceConfig { device: DEVICE_OUTPUT, ..device(DEVICE_OUTPUT, &bytes, longest) };
        let mut sink = Vhd::open_sink(&mut io, &config, false).unwrap();
        sink.plan(&mut io, &[Extent::data(0, SIZE as u64, 0, 0)]).unwrap();
        assert_eq!(sink.planned(&mut io).unwrap_err().code, code);
        assert!(io.log.is_empty());
        let past = [Extent::data(SIZE as u64 - 1, 2, 0, 0)];
        assert_eq!(sink.plan(&mut io, &past).unwrap_err().code, ErrorCode::BackingTooSmall);
    }
}
