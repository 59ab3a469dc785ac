//! Tables and the data of clusters on devices in memory: how much they read, in which order they write, and every crash.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;
use crate::crash::{Crashes, Files};
use crate::memory::{Change, MemoryDevices};
use crate::{BlockIo, DriverResult, Extent, OrderedWriter, ReadBelow};
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_abi::{ErrorCode, Phase, Request, DEVICE_OUTPUT};

const CRASHES: Crashes = Crashes { drawn: 4, seed: 1 };

/// A target that is about to change.
fn target(bytes: &[u8]) -> (MemoryDevices, OrderedWriter) {
    let mut io = MemoryDevices::new([(DEVICE_OUTPUT, bytes.to_vec())]);
    io.holes = true;
    io.enter(Phase::Target);
    (io, OrderedWriter::new(DEVICE_OUTPUT))
}

/// A table of entries that are not 0.
fn entries(count: u32) -> Vec<u8> {
    (1..=count).flat_map(u32::to_le_bytes).collect()
}

fn sparse() -> Table<Little32> {
    Table::sparse(DEVICE_OUTPUT, 0)
}

fn writes(io: &MemoryDevices) -> Vec<(u64, usize)> {
    let write = |change: &Change| match change {
        Change::Write { offset, bytes, .. } => Some((*offset, bytes.len())),
        _ => None,
    };
    io.log.iter().filter_map(write).collect()
}

#[test]
fn a_window_is_read_once_and_no_longer_than_its_bound() {
    let bytes = entries(100_000);
    for (cache_bytes, most) in [(0, 64 << 10), (1 << 20, 64 << 10), (5000, 4608), (512, 512), (100, 512)] {
        let (mut io, _) = target(&bytes);
        let mut table = Table::<Little32>::dense(DEVICE_OUTPUT, cache_bytes);
        let end = bytes.len() as u64;
        assert_eq!(table.get(&mut io, 4000, end).unwrap(), 1001);
        assert_eq!((io.executed(), io.bytes_read), (1, most));
        // The window begins with the sector of the entry.
        assert_eq!(table.get(&mut io, 3584, end).unwrap(), 897);
        assert_eq!(table.get(&mut io, 3584 + most - 4, end).unwrap(), (3584 + most as u32) / 4);
        assert_eq!(io.executed(), 1);
        assert_eq!(table.get(&mut io, 3584 + most, end).unwrap(), (3584 + most as u32) / 4 + 1);
        assert_eq!(io.executed(), 2);
        // No more than is asked for, in whole sectors.
        table.forget();
        let before = io.bytes_read;
        table.get(&mut io, 700, 701).unwrap();
        assert_eq!(io.bytes_read - before, 512);
    }
}

#[test]
fn entries_in_a_hole_are_not_read() {
    let mut bytes = vec![0; 1 << 20];
    bytes[500_000..500_004].copy_from_slice(&[9, 0, 0, 0]);
    let (mut io, mut out) = target(&bytes);
    let mut table = sparse();
    let mut found = Vec::new();
    let mut each = |_: &mut dyn BlockIo, index: u64, number: u32| {
        found.push((index, number));
        Ok(())
    };
    table.each(&mut io, 400, 200_000, &mut each).unwrap();
    assert_eq!(found, [((500_000 - 400) / 4, 9)]);
    assert!(io.bytes_read <= 64 << 10 && io.executed() < 10, "{} bytes, {} requests", io.bytes_read, io.executed());
    assert!(table.is_hole(&mut io, &(1000..40_000)).unwrap());
    // As far as was asked for, in whole sectors; nothing is known of what was not.
    assert_eq!((table.zeroes(1000), table.zeroes(900_000)), ((40_448 - 1000) / 4, 1));
    assert!(!table.is_hole(&mut io, &(499_000..500_001)).unwrap() && table.is_hole(&mut io, &(9..9)).unwrap());
    // What was changed in a hole is no hole, and what is in front of it and behind it is.
    table.set(&mut io, 4096, 40_000, 7).unwrap();
    assert_eq!(table.get(&mut io, 1024, 40_000).unwrap(), 0);
    assert_eq!(table.zeroes(1024), (4096 - 1024) / 4);
    assert_eq!((table.zeroes(4096), table.zeroes(4100)), (1, 1));
    for (range, is_hole) in [(1024..4096, true), (1024..4100, false), (4096..5000, false), (4608..40_000, true)] {
        assert_eq!(table.is_hole(&mut io, &range).unwrap(), is_hole, "{range:?}");
    }
    table.write(&mut io, &mut out).unwrap();
    assert_eq!(table.get(&mut io, 4096, 40_000).unwrap(), 7, "the hole is not what it was");
}

#[test]
fn changed_entries_are_read_back_and_written_once() {
    let (mut io, mut out) = target(&entries(1000));
    let mut table = sparse();
    table.write(&mut io, &mut out).unwrap();
    assert!(!table.is_changed() && io.log.is_empty());
    // Across a border between two sectors of a table, and another entry in the second of them.
    for (at, number) in [(504, 11), (520, 12), (608, 15), (1600, 13), (1608, 14)] {
        table.set(&mut io, at, 4000, number).unwrap();
        assert_eq!((table.changed(at), table.get(&mut io, at, 4000).unwrap()), (Some(number), number));
    }
    assert_eq!(
        (table.get(&mut io, 1604, 4000).unwrap(), table.changed(1604), table.changed(2048)),
        (402, Some(402), None)
    );
    let reads = io.executed();
    table.write(&mut io, &mut out).unwrap();
    assert_eq!(writes(&io), [(504, 108), (1600, 12)]);
    assert_eq!((io.executed() - reads, out.is_unflushed(), table.is_changed()), (2, true, false));
    let mut want = entries(1000);
    for (at, number) in [(504, 11), (520, 12), (608, 15), (1600, 13), (1608, 14)] {
        want[at..at + 4].copy_from_slice(&u32::to_le_bytes(number));
        assert_eq!(table.get(&mut io, at as u64, 4000).unwrap(), number);
    }
    assert!(io.files[&DEVICE_OUTPUT] == want);
}

/// What lies between two tables is not written, though they stand in neighboring sectors.
#[test]
fn tables_side_by_side_stay_apart() {
    let (mut io, mut out) = target(&entries(1000));
    let mut table = sparse();
    for (at, end) in [(512, 800), (1024, 1100), (1096, 1100), (1540, 2048), (2044, 2048), (2048, 2600)] {
        table.set(&mut io, at, end, 7).unwrap();
    }
    table.write(&mut io, &mut out).unwrap();
    // The last two are side by side without a gap.
    assert_eq!(writes(&io), [(512, 4), (1024, 76), (1540, 512)]);
}

#[test]
fn a_table_is_full_after_four_mebibytes() {
    let (mut io, mut out) = target(&[]);
    let mut table = Table::<Big64>::sparse(DEVICE_OUTPUT, 0);
    for sector in 0..8192 {
        assert!(!table.is_full());
        table.set(&mut io, sector * 512 + 8, u64::MAX >> 1, sector + 1).unwrap();
    }
    assert!(table.is_full());
    table.write(&mut io, &mut out).unwrap();
    assert!(!table.is_full());
    assert_eq!(writes(&io), [(8, 8191 * 512 + 8)]);
}

#[test]
fn entries_that_cannot_be_are_errors() {
    let (mut io, _) = target(&entries(1000));
    let mut table = sparse();
    for result in [table.get(&mut io, 511, 600).map(|_| ()), table.set(&mut io, 510, 600, 1)] {
        assert_eq!(result.unwrap_err().code, ErrorCode::InternalOverflow);
    }
    assert_eq!(table.get(&mut io, u64::MAX - 3, u64::MAX).unwrap_err().code, ErrorCode::InternalOverflow);
    io.fail_at = Some(io.executed());
    assert_eq!(table.get(&mut io, 512, 600).unwrap_err().errno, 5);
    assert_eq!(table.get(&mut io, 512, 600).unwrap(), 129, "what was not read is not held");
    // Neither are they where their sector is held.
    table.set(&mut io, 508, 600, 1).unwrap();
    assert_eq!(table.set(&mut io, 506, 600, 1).unwrap_err().code, ErrorCode::InternalOverflow);
}

/// A cluster that an entry names holds its data, whatever a power loss leaves: the flush in front of the entries.
#[test]
fn no_entry_names_what_is_not_durable() {
    let mut before = vec![0; 4096];
    before[2048..].fill(0x99);
    let (mut io, mut out) = target(&before);
    let mut table = sparse();
    let mut clusters = ClusterData::default();
    for (index, offset) in [(0, 2048), (1, 4096), (200, 6144)] {
        clusters.push_bytes(DEVICE_OUTPUT, offset, vec![0x40; 1024]);
        table.set(&mut io, index * 4, 2048, offset as u32).unwrap();
    }
    clusters.submit(&mut io, &mut out).unwrap();
    table.write(&mut io, &mut out).unwrap();
    let mut named = [0; 2];
    let mut verify = |files: Files| {
        let bytes = &files[&DEVICE_OUTPUT];
        for index in [0, 1, 200] {
            let at = Little32::decode(&bytes[index * 4..]) as usize;
            named[usize::from(at > 0)] += 1;
            assert!(at == 0 || bytes[at..at + 1024] == [0x40; 1024], "entry {index} names what is not there");
        }
    };
    assert!(CRASHES.each(&[(DEVICE_OUTPUT, before)].into(), &io.log, &mut verify) > 10);
    assert!(named.iter().all(|&count| count > 3), "{named:?}");
}

/// What entries named is given back when none of them is on the disk any more: the flush behind the entries.
#[test]
fn no_entry_is_left_when_a_table_is_clear() {
    let mut before = [entries(300), vec![0; 2000], entries(7)].concat();
    before[400..900].fill(0);
    before.extend([0x55; 1024]);
    let end = before.len() - 1024;
    let (mut io, mut out) = target(&before);
    let mut table = sparse();
    table.set(&mut io, 0, 1200, 77).unwrap();
    table.clear(&mut io, &mut out, &(4..end as u64)).unwrap();
    // A change that was not written is none, and the first entry was not to be cleared.
    assert!(!table.is_changed() && !out.is_unflushed() && table.get(&mut io, 0, 4).unwrap() == 1);
    assert_eq!(writes(&io), [(4, 396), (900, 300), (3200, 28)]);
    out.set_length(&mut io, end as u64).unwrap();
    let mut verify = |files: Files| {
        let bytes = &files[&DEVICE_OUTPUT];
        let clear = bytes[4..end].iter().all(|&byte| byte == 0);
        assert!(clear || bytes.len() == before.len(), "an entry names what was given back");
    };
    let files = [(DEVICE_OUTPUT, before.clone())].into();
    assert!(CRASHES.each(&files, &io.log, &mut verify) > 5);
}

/// What is below a cluster: bytes that follow from their place, up to a length.
struct Below(u64);

fn byte(at: u64) -> u8 {
    if (2 << 20..3 << 20).contains(&(at % (6 << 20))) {
        0
    } else {
        (at / 512 % 250) as u8 + 1
    }
}

impl ReadBelow for Below {
    fn exists(&self) -> bool {
        true
    }

    fn length(&self) -> u64 {
        self.0
    }

    fn read(&mut self, _: &mut dyn BlockIo, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        (guest_offset..).zip(buffer).for_each(|(at, place)| *place = byte(at));
        Ok(())
    }
}

#[test]
fn a_new_cluster_shows_what_is_below_around_what_arrives() {
    let size = 6 << 20;
    for length in [0, 100, 1_000_000, size - 512, u64::MAX] {
        let (mut io, mut out) = target(&[]);
        let mut clusters = ClusterData::default();
        let place = ClusterPlace { guest: size..2 * size - 1024, offset: 4096, is_new: true };
        let data = [0xee_u8; 2000];
        let content = crate::Content::Memory { address: data.as_ptr() as u64 };
        let parts = [
            Extent::zero(size + 1024, 512),
            Extent { guest_offset: size + 1536, length: 2000, content },
            Extent::zero(2 * size - 2000, 500),
        ];
        let mut below = Below(length.saturating_add(size));
        clusters.fill_around(&mut io, &mut out, &place, &parts, &mut below).unwrap();
        clusters.write_parts(&mut io, &mut out, &place, &parts).unwrap();
        clusters.submit(&mut io, &mut out).unwrap();
        let mut want: Vec<u8> = place.guest.clone().map(|at| if at < below.length() { byte(at) } else { 0 }).collect();
        want[1024..1536].fill(0);
        want[1536..3536].fill(0xee);
        let end = want.len() - 976;
        want[end..end + 500].fill(0);
        let mut is = io.files[&DEVICE_OUTPUT][4096..].to_vec();
        assert!(is.len() <= want.len());
        is.resize(want.len(), 0);
        let differ = is.iter().zip(&want).position(|(is, want)| is != want);
        assert!(differ.is_none(), "{length}: byte {differ:?}");
        // A chunk of zeroes is not written, and what was collected never takes more than it may.
        assert!(io.submits <= 2 && out.is_unflushed());
    }
}

#[test]
fn zeroes_are_written_where_a_cluster_was() {
    let (mut io, mut out) = target(&[7; 1024]);
    let place = |is_new| ClusterPlace { guest: 5000..6000, offset: 0, is_new };
    let mut clusters = ClusterData::default();
    clusters.write_parts(&mut io, &mut out, &place(true), &[Extent::zero(5000, 512)]).unwrap();
    clusters.submit(&mut io, &mut out).unwrap();
    assert!(io.log.is_empty() && !out.is_unflushed());
    clusters.write_parts(&mut io, &mut out, &place(false), &[Extent::zero(5000, 512)]).unwrap();
    let error = clusters.write_parts(&mut io, &mut out, &place(false), &[Extent::data(4999, 2, 1, 0)]).unwrap_err();
    assert_eq!(error.code, ErrorCode::InternalOverflow);
    clusters.submit(&mut io, &mut out).unwrap();
    assert_eq!(io.files[&DEVICE_OUTPUT], [[0; 512], [7; 512]].concat());
}

#[test]
fn much_is_submitted_on_the_way() {
    let (mut io, mut out) = target(&[]);
    let mut clusters = ClusterData::default();
    for index in 0..4095 {
        // Of the requests, those that the devices need least time for.
        clusters.push(Request::next_data(DEVICE_OUTPUT, index, 1));
        clusters.submit_if_full(&mut io, &mut out).unwrap();
    }
    assert_eq!(io.submits, 0);
    clusters.push_bytes(DEVICE_OUTPUT, 1 << 30, vec![0; 0]);
    clusters.submit_if_full(&mut io, &mut out).unwrap();
    assert_eq!((io.submits, io.executed()), (1, 4096));
    clusters.push_bytes(DEVICE_OUTPUT, 0, vec![1; (4 << 20) - 1]);
    clusters.submit_if_full(&mut io, &mut out).unwrap();
    assert_eq!(io.submits, 1);
    clusters.push_bytes(DEVICE_OUTPUT, 4 << 20, vec![1]);
    clusters.submit_if_full(&mut io, &mut out).unwrap();
    assert_eq!((io.submits, io.executed()), (2, 4098));
}
