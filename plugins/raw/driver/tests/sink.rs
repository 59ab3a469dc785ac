//! The sink against a model: an array of bytes.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{device_flags, DeviceConfig, DeviceRole, ErrorCode, Phase, DEVICE_OUTPUT};
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_guest_sdk::{BlockIo, Content, DriverResult, Extent, FormatDriver, ReadBelow, Sink};
use instar_raw_driver::{Raw, RawSink};
use proptest::prelude::*;

const OVERLAY: u32 = 0;

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

fn config(file_length: u64, max_length: u64) -> DeviceConfig {
    DeviceConfig {
        flags: device_flags::PRESENT | device_flags::WRITABLE,
        device: DEVICE_OUTPUT,
        file_length,
        max_length,
        virtual_size: file_length.next_multiple_of(512),
        ..DeviceConfig::default()
    }
}

fn open(length: u64) -> RawSink {
    Raw::open_sink(&mut MemoryDevices::default(), &config(length, i64::MAX as u64), false).unwrap()
}

fn data(guest_offset: u64, length: u64) -> Extent {
    Extent::data(guest_offset, length, OVERLAY, 0)
}

fn source() -> Vec<u8> {
    (0..8192u32).map(|i| (i % 251) as u8 | 1).collect()
}

fn devices(backing: Vec<u8>) -> MemoryDevices {
    MemoryDevices::new([(OVERLAY, source()), (DEVICE_OUTPUT, backing)])
}

/// What the disk reads as after these extents.
fn model(before: &[u8], extents: &[Extent], memory: &[u8], size: u64) -> Vec<u8> {
    let mut disk = before.to_vec();
    disk.resize(size as usize, 0);
    for extent in extents {
        let place = &mut disk[extent.guest_offset as usize..][..extent.length as usize];
        match extent.content {
            Content::Data { offset, .. } => {
                place.copy_from_slice(&source()[offset as usize..][..extent.length as usize]);
            }
            Content::Memory { .. } => place.copy_from_slice(&memory[..extent.length as usize]),
            Content::Zero => place.fill(0),
            Content::Encoded { .. } => unreachable!(),
        }
    }
    disk
}

proptest! {
    #[test]
    fn as_an_array_of_bytes(
        length in 0..4096usize,
        grown in prop::option::of(1..16u64),
        pieces in prop::collection::vec((1..4u8, 0..4u64, 1..5u64, 0..4000u64), 0..12),
    ) {
        let before: Vec<u8> = (0..length).map(|i| (i % 7) as u8).collect();
        let memory = vec![0xa5; 4096];
        let mut sink = open(length as u64);
        let mut io = devices(before.clone());
        if let Some(sectors) = grown {
            let size = sink.info().virtual_size + sectors * 512;
            sink.grow(&mut io, size, 0).unwrap();
            prop_assert_eq!(sink.info().virtual_size, size);
        }
        let size = sink.info().virtual_size;
        let mut at = 0;
        let mut extents = Vec::new();
        for (kind, skip, sectors, location) in pieces {
            let start = at + skip * 512;
            let length = (sectors * 512).min(size.saturating_sub(start));
            if length == 0 {
                break;
            }
            let content = match kind {
                1 => Content::Data { device: OVERLAY, offset: location },
                2 => Content::Zero,
                _ => Content::Memory { address: memory.as_ptr() as u64 },
            };
            extents.push(Extent { guest_offset: start, length, content });
            at = start + length;
        }
        sink.plan(&mut io, &extents).unwrap();
        let planned = sink.planned(&mut io).unwrap();
        prop_assert_eq!(&io.log, &vec![]);
        // Not longer than the plan said, and not before it.
        let bound = config(length as u64, planned.final_length);
        io.hold([(DeviceRole::Target, &bound)]);
        io.enter(Phase::Target);
        let middle = extents.len() / 2;
        for part in [&[], &extents[..middle], &extents[middle..]] {
            sink.write(&mut io, part, &mut Nothing).unwrap();
        }
        sink.finish(&mut io).unwrap();
        let expected = model(&before, &extents, &memory, size);
        let mut after = io.files[&DEVICE_OUTPUT].clone();
        prop_assert_eq!(after.len() as u64, planned.final_length);
        // A file that ends within a sector, and in which nothing changes there, stays as it is.
        prop_assert!(after.len() == expected.len() || after.len() == length);
        after.resize(expected.len(), 0);
        prop_assert_eq!(&after, &expected);
        let durable = io.log.last().is_none_or(|last| *last == Change::Flush { device: DEVICE_OUTPUT });
        prop_assert!(durable);
        // At every instant, each byte is the old or the new one.
        let mut files = devices(before.clone()).files;
        for change in &io.log {
            change.apply(&mut files);
            for (at, &byte) in files[&DEVICE_OUTPUT].iter().enumerate() {
                prop_assert!(byte == before.get(at).copied().unwrap_or(0) || byte == expected[at]);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_changes() {
    let mut io = devices(vec![1; 1000]);
    let code = |result: DriverResult<()>| result.unwrap_err().code;
    let past = data(512, 1024);
    assert_eq!(code(open(1000).plan(&mut io, &[past])), ErrorCode::BackingTooSmall);
    let wraps = Extent::zero(u64::MAX, 2);
    assert_eq!(code(open(1000).plan(&mut io, &[wraps])), ErrorCode::BackingTooSmall);
    // The last sector is not whole, and the file may not become longer.
    let mut sink = Raw::open_sink(&mut io, &config(1000, 1000), false).unwrap();
    assert_eq!(code(sink.plan(&mut io, &[data(512, 512)])), ErrorCode::UnsupportedFormat);
    assert_eq!(code(sink.grow(&mut io, 4096, 0)), ErrorCode::UnsupportedFormat);
    assert_eq!(code(sink.grow(&mut io, u64::MAX, 0)), ErrorCode::UnsupportedFormat);
    let fixed = DeviceConfig { flags: device_flags::PRESENT | device_flags::FIXED_LENGTH, ..config(1024, 1024) };
    let mut sink = Raw::open_sink(&mut io, &fixed, false).unwrap();
    assert_eq!(code(sink.grow(&mut io, 4096, 0)), ErrorCode::UnsupportedFormat);
    assert_eq!(sink.info().virtual_size, 1024);
    assert!(sink.plan(&mut io, &[data(512, 512)]).is_ok());
    // Who only plans may ask how long the device would have to be.
    let mut sink = Raw::open_sink(&mut io, &DeviceConfig { max_length: 1 << 40, ..fixed }, false).unwrap();
    sink.grow(&mut io, 4096, 0).unwrap();
    assert_eq!(sink.planned(&mut io).unwrap().final_length, 4096);
    assert_eq!(io.log, vec![]);
}

#[test]
fn nothing_to_write_is_nothing_done() {
    let mut io = devices(vec![1; 1000]);
    let mut sink = open(1000);
    sink.planned(&mut io).unwrap();
    sink.finish(&mut io).unwrap();
    assert_eq!(io.log, vec![]);
}

#[test]
fn encoded_data_cannot_be_written() {
    let mut io = devices(vec![1; 1024]);
    let error = open(1024).write(&mut io, &[Extent::encoded(0, 512, 0)], &mut Nothing).unwrap_err();
    assert_eq!(error.code, ErrorCode::InternalOverflow);
    assert_eq!(io.log, vec![]);
}
