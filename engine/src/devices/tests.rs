#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_sign_loss)]

use super::lock::{lock_read_only, lock_read_write};
use super::*;
use crate::cancel::Cancel;
use crate::sandbox::BufferAccess;
use instar_guest_abi::{request_status, DEVICE_OUTPUT};
use std::os::unix::fs::{FileExt, MetadataExt};
use tempfile::NamedTempFile;
use vm_memory::VolatileSlice;

/// A heap of guest memory that begins at this address.
const HEAP: u64 = 0x20_0000;

struct Memory(Vec<u8>);

impl BufferAccess for Memory {
    fn heap_slice(&self, address: u64, length: u64) -> Option<VolatileSlice<'_>> {
        let start = usize::try_from(address.checked_sub(HEAP)?).ok()?;
        let length = usize::try_from(length).ok()?;
        self.0.get(start..start.checked_add(length)?)?;
        // SAFETY: the range lies within the vector, which outlives the slice; tests have one thread.
        Some(unsafe { VolatileSlice::new(self.0.as_ptr().add(start).cast_mut(), length) })
    }
}

struct Bench {
    devices: Devices,
    memory: Memory,
    files: Vec<NamedTempFile>,
}

/// Slot 0 read-only, slot 1 writable, output writable and with room to grow by 1 MiB.
fn bench(contents: [&[u8]; 3]) -> Bench {
    let mut devices = Devices::new();
    let mut files = Vec::new();
    for ((slot, writable), bytes) in [(0, false), (1, true), (DEVICE_OUTPUT, true)].into_iter().zip(contents) {
        let file = NamedTempFile::new().unwrap();
        file.as_file().write_all_at(bytes, 0).unwrap();
        let length = bytes.len() as u64;
        let max = if slot == DEVICE_OUTPUT { length + (1 << 20) } else { length };
        devices.attach(slot, Device::new(file.reopen().unwrap(), writable, length, max, false));
        files.push(file);
    }
    devices.enter(instar_guest_abi::Phase::Target).unwrap();
    Bench { devices, memory: Memory((0..1 << 20).map(|i| (i % 251) as u8).collect()), files }
}

impl Bench {
    fn run(&mut self, requests: &mut [Request]) {
        self.devices.execute(&self.memory, requests).unwrap();
        assert!(requests.iter().all(|r| r.status == request_status::OK), "{requests:?}");
    }

    fn refuse(&mut self, request: Request, why: &str) {
        let before = self.content();
        let error = self.devices.execute(&self.memory, &mut [request]).unwrap_err();
        assert!(error.0.contains(why), "{} lacks {why}", error.0);
        assert!(self.content() == before);
    }

    fn content(&self) -> Vec<Vec<u8>> {
        self.files.iter().map(|file| std::fs::read(file.path()).unwrap()).collect()
    }
}

const OUT: u32 = DEVICE_OUTPUT;

#[test]
fn requests_that_break_a_rule_end_the_guest() {
    let mut b = bench([&[1; 4096], &[2; 4096], &[3; 4096]]);
    let length = 4096 + (1 << 20);
    let cases = [
        (Request { op: 0, ..Request::flush(OUT) }, "operation"),
        (Request { op: 77, ..Request::flush(OUT) }, "operation"),
        (Request { flags: 1, ..Request::write(OUT, 0, HEAP, 512) }, "flags"),
        (Request { flags: 2, ..Request::zero(OUT, 0, 512) }, "flags"),
        (Request::read(5, 0, HEAP, 512), "absent"),
        (Request::read(17, 0, HEAP, 512), "absent"),
        (Request::flush(u32::MAX), "absent"),
        (Request::read(0, u64::MAX, HEAP, 512), "overflows"),
        (Request::read(0, i64::MAX as u64, HEAP, 1), "overflows"),
        (Request::write(0, 0, HEAP, 512), "read-only"),
        (Request::zero(0, 0, 512), "read-only"),
        (Request::discard(0, 0, 512), "read-only"),
        (Request::set_length(0, 0), "read-only"),
        (Request::copy(1, 0, 0, 0, 512), "read-only"),
        (Request::read(0, 0, HEAP - 1, 512), "heap"),
        (Request::read(0, 0, 0, 512), "heap"),
        (Request::read(0, 0, HEAP + (1 << 20) - 511, 512), "heap"),
        (Request::write(OUT, 0, u64::MAX - 5, 512), "heap"),
        (Request::read(0, 0, HEAP, 1 << 40), "heap"),
        (Request::write(OUT, length - 511, HEAP, 512), "grow"),
        (Request::write(1, 4096, HEAP, 1), "grow"),
        (Request::set_length(OUT, length + 1), "grow"),
        (Request::set_length(OUT, u64::MAX), "overflows"),
        (Request::copy(0, 0, OUT, length, 1), "grow"),
        (Request::copy(9, 0, OUT, 0, 1), "source that is absent"),
        (Request::copy(0, u64::MAX, OUT, 0, 2), "source range"),
        (Request::copy(OUT, 0, OUT, 511, 512), "overlap"),
        (Request::copy(OUT, 512, OUT, 0, 513), "overlap"),
    ];
    for (request, why) in cases {
        b.refuse(request, why);
    }
    // A rule that is broken later in a batch: what came before was executed, what comes after is not.
    let mut requests =
        [Request::write(OUT, 0, HEAP, 16), Request::write(OUT, 16, 0, 16), Request::write(OUT, 32, HEAP, 16)];
    b.devices.execute(&b.memory, &mut requests).unwrap_err();
    let out = &b.content()[2];
    assert_eq!((out[..16] == b.memory.0[..16], out[16], out[32]), (true, 3, 3));
}

#[test]
fn a_block_device_keeps_its_length() {
    let file = NamedTempFile::new().unwrap();
    let mut devices = Devices::new();
    devices.attach(OUT, Device::new(file.reopen().unwrap(), true, 4096, 1 << 30, true));
    devices.enter(instar_guest_abi::Phase::Target).unwrap();
    let memory = Memory(vec![0; 4096]);
    for request in [Request::set_length(OUT, 8192), Request::write(OUT, 4096, HEAP, 1)] {
        devices.execute(&memory, &mut [request]).unwrap_err();
    }
    // A driver that has emptied an image asks for this: nothing happens.
    for length in [4096, 512] {
        devices.execute(&memory, &mut [Request::set_length(OUT, length)]).unwrap();
        assert_eq!(devices.device(OUT).unwrap().length, 4096);
    }
}

#[test]
fn reads_and_writes_that_go_on_from_each_other() {
    let mut b = bench([&[7; 1000], &[], &[]]);
    // Backwards in memory, forwards in the file, and past its end.
    let mut reads: Vec<Request> = (0..100).map(|i| Request::read(0, i * 16, HEAP + 16 * (99 - i), 16)).collect();
    b.run(&mut reads);
    let expected: Vec<u8> = (0..1600).map(|i| if i < 1000 { 7 } else { 0 }).collect();
    for i in 0..100 {
        let at = 16 * (99 - i);
        assert_eq!(b.memory.0[at..at + 16], expected[16 * i..16 * i + 16], "{i}");
    }
    b.memory.0 = (0..1 << 20).map(|i| (i % 241) as u8).collect();
    let mut writes: Vec<Request> = (0..200).map(|i| Request::write(OUT, i * 16, HEAP + 32 * i, 16)).collect();
    b.run(&mut writes);
    let written: Vec<u8> = (0..200).flat_map(|i| b.memory.0[32 * i..32 * i + 16].to_vec()).collect();
    assert!(b.content()[2] == written);
    assert_eq!((b.devices.stats().read, b.devices.stats().written), (1600, 3200));
}

#[test]
fn copies_within_the_kernel_and_through_a_buffer() {
    let source: Vec<u8> = (0..3_000_000).map(|i| (i / 7 % 253) as u8 + 1).collect();
    for through_buffer in [false, true] {
        let mut b = bench([&source, &[], &[9; 2_500_000]]);
        if through_buffer {
            b.devices.copier.refuse_kernel(0, OUT);
        }
        // Two that go on from each other, one elsewhere, and one past the end of the source.
        b.run(&mut [
            Request::copy(0, 100, OUT, 200, 1_000_000),
            Request::copy(0, 1_000_100, OUT, 1_000_200, 500_000),
            Request::copy(0, 5, OUT, 2_000_000, 7),
            Request::copy(0, 2_999_990, OUT, 2_499_000, 2_000),
        ]);
        let mut expected = vec![9; 2_500_000];
        expected[200..1_500_200].copy_from_slice(&source[100..1_500_100]);
        expected[2_000_000..2_000_007].copy_from_slice(&source[5..12]);
        expected.resize(2_501_000, 0);
        expected[2_499_000..].fill(0);
        expected[2_499_000..2_499_010].copy_from_slice(&source[2_999_990..]);
        assert!(b.content()[2] == expected, "{through_buffer}");
        let stats = b.devices.stats();
        let (kernel, host) = (stats.copied_in_kernel, stats.copied_through_host);
        assert_eq!(if through_buffer { (kernel, host) } else { (host, kernel) }, (0, 1_500_017));
    }
}

#[test]
fn holes_stay_holes_and_are_cut_into_what_was_there() {
    for through_buffer in [false, true] {
        let mut b = bench([&[], &[], &[8; 1 << 20]]);
        let source = b.files[0].as_file();
        source.set_len(8 << 20).unwrap();
        source.write_all_at(&[3; 65536], 300_000).unwrap();
        b.devices.attach(0, Device::new(b.files[0].reopen().unwrap(), false, 8 << 20, 0, false));
        b.devices.attach(OUT, Device::new(b.files[2].reopen().unwrap(), true, 1 << 20, 8 << 20, false));
        if through_buffer {
            b.devices.copier.refuse_kernel(0, OUT);
        }
        b.run(&mut [Request::copy(0, 0, OUT, 0, 8 << 20)]);
        let content = b.content();
        assert!(content[2] == content[0] && content[2].len() == 8 << 20);
        assert!(b.files[2].as_file().metadata().unwrap().blocks() <= 512, "{through_buffer}");
    }
}

#[test]
fn a_copy_past_the_end_of_the_source_leaves_nothing_on_a_block_device() {
    let mut b = bench([&[7; 1000], &[], &[9; 1 << 20]]);
    b.devices.attach(OUT, Device::new(b.files[2].reopen().unwrap(), true, 1 << 20, 1 << 20, true));
    b.run(&mut [Request::copy(0, 500, OUT, 4096, 65536), Request::copy(0, 1 << 40, OUT, 200_000, 512)]);
    let out = &b.content()[2];
    assert!(out[4096..4596].iter().all(|&byte| byte == 7));
    assert!(out[4596..4096 + 65536].iter().chain(&out[200_000..200_512]).all(|&byte| byte == 0));
    assert_eq!((out.len(), out[4095], out[4096 + 65536], out[200_512]), (1 << 20, 9, 9, 9));
}

#[test]
fn a_copy_can_be_interrupted() {
    let mut b = bench([&[7; 1000], &[], &[9; 1000]]);
    let cancel = Cancel::new();
    cancel.cancel();
    b.devices.pace_mut().stop_when(cancel);
    let mut requests = [Request::copy(0, 0, OUT, 0, 1000), Request::flush(OUT)];
    b.devices.execute(&b.memory, &mut requests).unwrap();
    assert_eq!(requests.map(|r| r.status), [libc::EINTR, request_status::NOT_RUN]);
    assert!(b.content()[2] == [9; 1000]);
}

#[test]
fn zeroing_gives_space_back_and_never_grows_the_file() {
    let mut b = bench([&[], &[5; 1 << 20], &[6; 1 << 20]]);
    b.run(&mut [
        Request::zero(OUT, 4096, 8192),
        Request::zero(OUT, (1 << 20) - 10, 4096),
        Request::discard(1, 0, 1 << 20),
    ]);
    let content = b.content();
    assert_eq!(content[2].len(), 1 << 20);
    assert!(content[2][4096..12288].iter().all(|&byte| byte == 0));
    assert_eq!((content[2][4095], content[2][12288], content[2][(1 << 20) - 10]), (6, 6, 0));
    assert_eq!(content[1].len(), 1 << 20);
    assert!(b.files[1].as_file().metadata().unwrap().blocks() < 64, "the space was not given back");
}

#[test]
fn what_is_known_of_zeroes_follows_every_change() {
    let mut b = bench([&[], &[5; 1 << 20], &[6; 1 << 20]]);
    let (from, to, unit) = (1 << 20, 512 << 10, 256 << 10);
    let copied = |b: &Bench| b.content()[2][to..to + 256 * 1024].to_vec();
    // The file grew there: nothing of it is data, and nothing needs to be zeroed.
    b.run(&mut [Request::set_length(OUT, 2 << 20), Request::copy(OUT, from, OUT, to as u64, unit)]);
    assert!(copied(&b).iter().all(|&byte| byte == 0));
    // Written by the guest, by a copy, and given up again: each time the copy has what the source has.
    b.run(&mut [Request::write(OUT, from + 4096, HEAP, 4096), Request::copy(OUT, from, OUT, to as u64, unit)]);
    assert!(copied(&b) == b.content()[2][1 << 20..][..256 * 1024]);
    b.run(&mut [Request::copy(1, 0, OUT, from, unit), Request::copy(OUT, from, OUT, to as u64, unit)]);
    assert!(copied(&b).iter().all(|&byte| byte == 5));
    b.run(&mut [Request::zero(OUT, from, unit), Request::copy(OUT, from, OUT, to as u64, unit)]);
    assert!(copied(&b).iter().all(|&byte| byte == 0));
    b.run(&mut [
        Request::copy(1, 0, OUT, from, unit),
        Request::set_length(OUT, from),
        Request::set_length(OUT, 2 << 20),
    ]);
    b.run(&mut [Request::copy(1, 0, OUT, to as u64, unit), Request::copy(OUT, from, OUT, to as u64, unit)]);
    assert!(copied(&b).iter().all(|&byte| byte == 0));
}

#[test]
fn requests_of_no_bytes_change_no_length() {
    let mut b = bench([&[1; 512], &[2; 8192], &[3; 4096]]);
    b.run(&mut [Request::copy(0, 0, OUT, 60_000, 0), Request::write(OUT, 70_000, HEAP, 0)]);
    assert_eq!(b.devices.device(OUT).unwrap().length, 4096, "what the file has");
    // A ZERO ends where the file does, and not where the empty requests did.
    b.run(&mut [Request::zero(OUT, 4000, 80_000)]);
    let out = &b.content()[2];
    assert!(out.len() == 4096 && out[..4000] == [3; 4000] && out[4000..] == [0; 96]);
    assert_eq!(b.devices.stats().zeroed, 96);
}

#[test]
fn flushes_count_only_where_something_was_written() {
    let mut b = bench([&[], &[0; 512], &[0; 512]]);
    b.run(&mut [
        Request::flush(0),
        Request::flush(1),
        Request::write(1, 0, HEAP, 512),
        Request::flush(1),
        Request::flush(1),
    ]);
    assert_eq!(b.devices.stats().flushes, 1);
    b.run(&mut [Request::set_length(OUT, 1024), Request::flush(OUT)]);
    assert_eq!((b.devices.stats().flushes, b.content()[2].len()), (2, 1024));
}

#[test]
fn the_first_failure_stops_the_batch() {
    let mut b = bench([&[], &[1; 512], &[2; 512]]);
    // A descriptor that may not be written, behind a slot that says it may.
    let read_only = std::fs::File::open(b.files[1].path()).unwrap();
    b.devices.attach(1, Device::new(read_only, true, 512, 512, false));
    let mut requests =
        [Request::write(OUT, 0, HEAP, 16), Request::write(1, 0, HEAP, 16), Request::write(OUT, 16, HEAP, 16)];
    b.devices.execute(&b.memory, &mut requests).unwrap();
    assert_eq!(requests.map(|r| r.status), [request_status::OK, libc::EBADF, request_status::NOT_RUN]);
    assert_eq!((b.content()[2][16], &b.content()[1]), (2, &vec![1; 512]));
}

#[test]
fn locks_conflict_as_qemu_s_do() {
    let file = NamedTempFile::new().unwrap();
    let open = || file.reopen().unwrap();
    let (reader, other_reader) = (open(), open());
    lock_read_only(&reader).unwrap();
    lock_read_only(&other_reader).unwrap();
    let error = lock_read_write(&open()).unwrap_err().to_string();
    assert_eq!(error, "Failed to get \"write\" lock");
    drop((reader, other_reader));
    let writer = open();
    lock_read_write(&writer).unwrap();
    assert!(lock_read_write(&open()).is_err());
    assert_eq!(lock_read_only(&open()).unwrap_err().to_string(), "Failed to get shared \"write\" lock");
    drop(writer);
    lock_read_write(&open()).unwrap();
}

#[test]
fn the_next_data_is_told_and_a_read_only_device_is_asked() {
    let mut b = bench([&[1; 4096], &[2; 4096], &[3; 4096]]);
    // Data from 1 MiB to 1 MiB + 8 KiB, on a file system that knows holes.
    b.files[0].as_file().set_len(4 << 20).unwrap();
    b.files[0].as_file().write_all_at(&[0; 4096], 0).unwrap();
    b.files[0].as_file().write_all_at(&[9; 8192], 1 << 20).unwrap();
    let mut requests = [
        Request::next_data(0, 65536, 4 << 20),
        Request::next_data(0, (1 << 20) + 100, 50),
        Request::next_data(0, 2 << 20, 1 << 20),
        Request::read(0, 0, HEAP, 512),
        Request::next_data(0, 512, 0),
    ];
    b.run(&mut requests);
    let answer = |index: usize| (requests[index].offset, requests[index].length);
    assert_eq!(answer(0), (1 << 20, 8192));
    assert_eq!(answer(1), ((1 << 20) + 100, 50));
    assert_eq!(answer(2), (3 << 20, 0), "a hole up to the end of what was asked for");
    assert_eq!(answer(4), (512, 0));
    b.refuse(Request::next_data(0, i64::MAX as u64, 1), "overflows");
    b.refuse(Request { flags: 1, ..Request::next_data(0, 0, 1) }, "flags");
    b.refuse(Request::next_data(5, 0, 1), "absent");
}

#[test]
fn work_out_of_proportion_is_told_until_something_is_changed() {
    let mut b = bench([&[1; 4096], &[2; 4096], &[3; 4096]]);
    let time = std::time::Duration::ZERO;
    let reads: Vec<Request> = (0..256).map(|_| Request::read(1, 0, HEAP, 1 << 20)).collect();
    (0..4).for_each(|_| b.run(&mut reads.clone()));
    assert_eq!(b.devices.excess(time), None, "a GiB is granted to any image");
    (0..4).for_each(|_| b.run(&mut reads.clone()));
    let excess = b.devices.excess(time).unwrap();
    assert_eq!(excess.device, 1);
    assert!(excess.text.contains("out of proportion"), "{}", excess.text);
    b.run(&mut [Request::write(OUT, 0, HEAP, 512)]);
    assert_eq!(b.devices.excess(time), None, "what was begun is finished");
}
