//! What `Detected` says of data that is all zeroes, whatever it remembers of it.
#![allow(clippy::panic, clippy::cast_possible_truncation, missing_docs)]

use core::ops::Range;
use instar_guest_sdk::abi::ImageInfo;
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, Extents, Source};
use instar_guest_view::{Detected, Filtered};

const DEVICE: u32 = 3;

/// All of a device, in extents of this many bytes: plain ones, or some that only it can decode.
struct Plain(u64, u64, bool);

impl Source for Plain {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.0, cluster_size: self.1 }
    }

    fn verify(&mut self, _: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        Ok(0)
    }

    fn extents(&mut self, _: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let mut at = range.start;
        while at < range.end {
            let length = (self.1 - at % self.1).min(range.end - at);
            let extent = match self.2 {
                true => Extent::encoded(at, length, at),
                false => Extent { guest_offset: at, length, content: Content::Data { device: DEVICE, offset: at } },
            };
            if !out.push(extent) {
                break;
            }
            at += length;
        }
        Ok(at)
    }

    fn read(&mut self, io: &mut dyn BlockIo, _: &Extent, from: u64, buffer: &mut [u8]) -> DriverResult<()> {
        io.read(DEVICE, from, buffer)
    }

    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Ok(0)
    }
}

/// What is said of a disk, with room for `room` extents: for each byte, whether it is said to be zero.
fn said(source: &mut dyn Source, io: &mut dyn BlockIo, room: usize) -> Vec<bool> {
    let end = source.info().virtual_size;
    let (mut from, mut all) = (0, Vec::new());
    let mut extents = Extents::with_room_for(room);
    while from < end {
        extents.clear();
        let next = source.extents(io, from..end, &mut extents).unwrap_or_else(|error| panic!("{error:?}"));
        for extent in extents.iter() {
            assert_eq!(extent.guest_offset, all.len() as u64, "no gap");
            let zero = extent.content == Content::Zero;
            if let Content::Data { offset, .. } = extent.content {
                assert_eq!(offset, extent.guest_offset);
            }
            all.extend((0..extent.length).map(|_| zero));
        }
        assert!(next > from && next == all.len() as u64, "{from} {next}");
        from = next;
    }
    all
}

/// A source in which zeroes are found in units of this many bytes.
fn detected(source: Plain, unit: u64) -> Filtered<Box<dyn Source>, Detected> {
    Filtered::by(Detected::new(unit), Box::new(source))
}

/// A disk of `units` units, of which those are zero that `zero` says.
fn disk(unit: u64, units: u64, zero: impl Fn(u64) -> bool) -> Vec<u8> {
    let bytes = |index| vec![if zero(index) { 0 } else { 1 }; usize::try_from(unit).unwrap_or(0)];
    (0..units).flat_map(bytes).collect()
}

#[test]
fn whole_units_of_zeroes_are_zeroes() {
    let mut bytes = disk(16, 64, |unit| unit % 3 == 0 || unit > 50);
    // One byte keeps a unit, at its beginning and at its end.
    bytes[16 * 3] = 1;
    bytes[16 * 7 - 1] = 1;
    let size = bytes.len() as u64;
    let wanted: Vec<bool> =
        (0..size).map(|at| at / 16).map(|unit| (unit % 3 == 0 && ![3, 6].contains(&unit)) || unit > 50).collect();
    for room in [1, 2, 3, 1000] {
        let mut io = MemoryDevices::new([(DEVICE, bytes.clone())]);
        let mut source = detected(Plain(size, size, false), 16);
        for pass in 0..3 {
            assert_eq!(said(&mut source, &mut io, room), wanted, "room for {room}, pass {pass}");
        }
    }
}

#[test]
fn more_than_can_be_remembered_is_looked_at_again() {
    let units = 600_000;
    let bytes = disk(1, units, |unit| unit % 2 == 0);
    let wanted: Vec<bool> = bytes.iter().map(|&byte| byte == 0).collect();
    let mut io = MemoryDevices::new([(DEVICE, bytes)]);
    let mut source = detected(Plain(units, 100_000, false), 1);
    for room in [1 << 14, 1 << 14, 1000] {
        assert!(said(&mut source, &mut io, room) == wanted, "room for {room}");
    }
}

#[test]
fn what_is_encoded_is_not_cut() {
    let bytes = disk(64, 8, |unit| [0, 1, 2, 5].contains(&unit));
    let mut io = MemoryDevices::new([(DEVICE, bytes)]);
    let mut source = detected(Plain(512, 128, true), 64);
    let wanted: Vec<bool> = (0..512).map(|at| at < 128).collect();
    for _ in 0..2 {
        assert_eq!(said(&mut source, &mut io, 100), wanted);
    }
}
