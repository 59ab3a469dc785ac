//! Compressed grains that arrive in pieces: a sector, or what lies between any two places, in each call of the sink.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{ErrorCode, Phase, DEVICE_OUTPUT};
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, FormatDriver, ReadBelow, Sink};
use instar_vmdk_driver::{Vmdk, VmdkSink};
use instar_vmdk_testkit::{build, device, le32, le64, Spec, State, View, GRAIN};

/// Of two tables and a half.
const SIZE: usize = 1200 * GRAIN - 512;
/// The device of what arrives.
const FROM: u32 = 0;

struct Below(Vec<u8>);

impl ReadBelow for Below {
    fn exists(&self) -> bool {
        !self.0.is_empty()
    }

    fn length(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&mut self, _: &mut dyn BlockIo, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        for (byte, at) in buffer.iter_mut().zip(guest_offset as usize..) {
            *byte = self.0.get(at).copied().unwrap_or_default();
        }
        Ok(())
    }
}

fn backing(footer: bool) -> Vec<u8> {
    let spec = Spec { compressed: true, redundant: !footer, footer, lazy_tables: footer, ..Spec::new(SIZE, 5, 4) };
    build(&spec.with([(7, State::Data(0x44)), (700, State::Data(0x45))]))
}

fn open(io: &mut MemoryDevices, has_backing: bool) -> VmdkSink {
    let config = device(DEVICE_OUTPUT, &io.files[&DEVICE_OUTPUT], u64::MAX);
    Vmdk::open_sink(io, &config, has_backing).unwrap()
}

/// Write these extents, each in `calls` calls at most, which end at any sector.
fn write(io: &mut MemoryDevices, extents: &[Extent], below: &mut Below, random: &mut Random) {
    let mut pieces: Vec<Vec<Extent>> = Vec::new();
    for extent in extents {
        let mut at = extent.guest_offset;
        while at < extent.end() {
            let end = at + (1 + random.below(3)) * 512;
            let piece = extent.clip(at..end).unwrap();
            match pieces.last_mut().filter(|_| random.coin()) {
                Some(call) => call.push(piece),
                None => pieces.push(vec![piece]),
            }
            at = piece.end();
        }
    }
    let mut sink = open(io, below.exists());
    for piece in &pieces {
        sink.plan(io, piece).unwrap();
    }
    let planned = sink.planned(io).unwrap();
    io.enter(Phase::Target);
    for piece in &pieces {
        sink.write(io, piece, below).unwrap();
    }
    sink.finish(io).unwrap();
    assert!(io.files[&DEVICE_OUTPUT].len() as u64 <= planned.final_length);
    assert!(io.unflushed().is_empty());
}

#[test]
fn grains_in_pieces_are_written_once() {
    let mut random = Random::seeded(3);
    for round in 0..24 {
        let footer = round % 2 == 0;
        let mut below = Below(if round % 3 == 0 { Vec::new() } else { (0..SIZE).map(|at| (at / 900) as u8).collect() });
        let from: Vec<u8> = (0..SIZE).map(|at| (at / 5) as u8 ^ round).collect();
        let memory = from.clone();
        let mut io = MemoryDevices::new([(FROM, from.clone()), (DEVICE_OUTPUT, backing(footer))]);
        let mut wanted = View::new(&io.files[&DEVICE_OUTPUT]).content(&below.0);
        // Some ranges, ascending, none of which touches a grain that is in use.
        let mut extents = Vec::new();
        let mut at = 0;
        while at < SIZE as u64 {
            let length = (1 + random.below(7)) * 512;
            let end = (at + length).min(SIZE as u64);
            let free = [7, 700].iter().all(|grain| end <= grain * GRAIN as u64 || at >= (grain + 1) * GRAIN as u64);
            let content = match random.below(4) {
                0 => Content::Zero,
                1 => Content::Memory { address: memory[at as usize..].as_ptr() as u64 },
                _ => Content::Data { device: FROM, offset: at },
            };
            if free && random.below(3) > 0 {
                let range = at as usize..end as usize;
                match content {
                    Content::Zero => wanted[range].fill(0),
                    _ => wanted[range.clone()].copy_from_slice(&from[range]),
                }
                extents.push(Extent { guest_offset: at, length: end - at, content });
            }
            at = end + random.below(40) * 512 * u64::from(random.coin());
        }
        write(&mut io, &extents, &mut below, &mut random);
        let now = View::new(&io.files[&DEVICE_OUTPUT]);
        assert!(now.content(&below.0) == wanted, "round {round}");
        now.assert_consistent();
        assert!(now.entries.iter().all(|copy| *copy == now.entries[0]), "the copies of the tables differ");
        // A second time, everything is there.
        let before = io.files[&DEVICE_OUTPUT].clone();
        let mut again = MemoryDevices::new([(FROM, from), (DEVICE_OUTPUT, before.clone())]);
        write(&mut again, &extents, &mut below, &mut random);
        let now = &again.files[&DEVICE_OUTPUT];
        assert!(now.len() == before.len() && now[1024..] == before[1024..], "round {round}");
    }
}

/// Only the content ID and, if a grain is new, the header are written in front of the end of the file, the footer included.
#[test]
fn nothing_that_is_there_is_written_over() {
    for (footer, guest) in [(false, 0), (true, 0), (true, 7 * GRAIN as u64)] {
        let bytes = backing(footer);
        let held = View::new(&bytes).content(&[]);
        let mut io = MemoryDevices::new([(FROM, held), (DEVICE_OUTPUT, bytes.clone())]);
        let extents = [Extent::data(guest, 512, FROM, guest)];
        write(&mut io, &extents, &mut Below(Vec::new()), &mut Random::seeded(1));
        let free = bytes.len() as u64 - if footer { 3 * 512 } else { 0 };
        let tables = io.log.iter().filter_map(|change| match change {
            Change::Write { offset, bytes, .. } if *offset < free && *offset >= 1024 => Some(bytes.len()),
            _ => None,
        });
        let copies = if guest > 0 {
            0
        } else if footer {
            1
        } else {
            2
        };
        assert!(tables.eq(std::iter::repeat_n(2048, copies)), "{footer} {guest}");
        let header = io.log.iter().filter(|change| matches!(change, Change::Write { offset: 0, .. })).count();
        assert_eq!(header, usize::from(footer && guest == 0));
    }
}

/// A scan of the file finds a new table as it finds those that VMware wrote.
#[test]
fn a_marker_is_in_front_of_a_new_table() {
    let mut io = MemoryDevices::new([(FROM, vec![1; SIZE]), (DEVICE_OUTPUT, backing(true))]);
    let end = io.files[&DEVICE_OUTPUT].len();
    let extents = [Extent::data(1100 * GRAIN as u64, GRAIN as u64, FROM, 0)];
    write(&mut io, &extents, &mut Below(Vec::new()), &mut Random::seeded(1));
    let bytes = &io.files[&DEVICE_OUTPUT];
    let table = le32(bytes, le64(bytes, 56) as usize * 512 + 8) * 512;
    assert_eq!((le64(bytes, table - 512), le32(bytes, table - 504), le32(bytes, table - 500)), (4, 0, 1));
    // The grain takes the place of the footer.
    assert_eq!((le32(bytes, table + (1100 - 1024) * 4) * 512, table), (end - 1536, end - 1536 + 1024));
}

#[test]
fn what_is_encoded_is_asked_for_before_it_is_counted() {
    let mut io = MemoryDevices::new([(FROM, vec![1; SIZE]), (DEVICE_OUTPUT, backing(false))]);
    let mut sink = open(&mut io, false);
    let extents = [Extent::data(0, 512, FROM, 0), Extent::encoded(GRAIN as u64, GRAIN as u64, 9)];
    assert_eq!(sink.plan(&mut io, &extents).unwrap_err().code, ErrorCode::NotImplemented);
    sink.plan(&mut io, &[extents[0], Extent::data(GRAIN as u64, GRAIN as u64, FROM, 0)]).unwrap();
    assert_eq!(sink.planned(&mut io).unwrap().new_data_clusters, 2);
    // A grain that is in use, and reads something else.
    let error = open(&mut io, false).plan(&mut io, &[Extent::data(7 * GRAIN as u64 + 512, 512, FROM, 0)]).unwrap_err();
    assert_eq!(error.code, ErrorCode::UnsupportedFormat);
    assert!(error.text.contains("guest offset 7168 is in use"), "{error}");
    assert!(io.log.is_empty());
}
