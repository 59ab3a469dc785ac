#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::super::piece::Segment;
use super::super::{Cache, Device, Devices, Workers};
use super::{Plan, Way, LEAST};
use crate::cancel::Cancel;
use crate::sandbox::BufferAccess;
use instar_guest_abi::{request_status, Request, DEVICE_OUTPUT};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::VolatileSlice;

/// These copies need no memory of a guest.
struct NoMemory;

impl BufferAccess for NoMemory {
    fn heap_slice(&self, _: u64, _: u64) -> Option<VolatileSlice<'_>> {
        None
    }
}

const OUT: u32 = DEVICE_OUTPUT;
const ROOM: u64 = 64 << 20;

/// Two sources, and a target that may grow; what the target should hold.
struct Bench {
    devices: Devices,
    sources: [Vec<u8>; 2],
    target: File,
    model: Vec<u8>,
}

/// A file where most systems know direct I/O, with bytes that depend on where they are.
fn file(length: u64, salt: u64) -> (File, Vec<u8>) {
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let bytes: Vec<u8> = (0..length).map(|i| (i * 7 + i / 4096 * 13 + salt) as u8 | 1).collect();
    file.write_all_at(&bytes, 0).unwrap();
    (file, bytes)
}

fn bench(sources: [u64; 2], target: u64, cache: Cache) -> Bench {
    let mut devices = Devices::new();
    let (out, model) = file(target, 101);
    let with_bytes = [file(sources[0], 3), file(sources[1], 57)];
    let sources = with_bytes.each_ref().map(|(_, bytes)| bytes.clone());
    for (number, (file, bytes)) in (0..).zip(with_bytes) {
        devices.attach(number, Device::new(file, false, bytes.len() as u64, 0, false));
    }
    let target_file = out.try_clone().unwrap();
    devices.attach(OUT, Device::new(out, true, target, target + ROOM, false));
    // Not every file system that tests run on knows direct I/O: then these cache modes are refused, and there is nothing to try.
    devices.set_cache(cache).unwrap();
    devices.set_workers(Some(Workers::start().unwrap()));
    devices.enter(instar_guest_abi::Phase::Target).unwrap();
    Bench { devices, sources, target: target_file, model }
}

impl Bench {
    fn run(&mut self, requests: &mut [Request]) {
        self.devices.execute(&NoMemory, requests).unwrap();
        assert!(requests.iter().all(|request| request.status == request_status::OK), "{requests:?}");
        for request in requests {
            self.apply(request);
        }
    }

    fn apply(&mut self, request: &Request) {
        let (from, to, length) = (request.src_offset as usize, request.offset as usize, request.length as usize);
        let source = &self.sources[request.src_device as usize];
        self.model.resize(self.model.len().max(to + length), 0);
        for i in 0..length {
            self.model[to + i] = source.get(from + i).copied().unwrap_or(0);
        }
    }

    #[track_caller]
    fn check(&self) {
        let mut bytes = vec![0; self.target.metadata().unwrap().len() as usize];
        // Also through the page cache: both ways show the same.
        let direct = rustix::fs::fcntl_getfl(&self.target).unwrap();
        rustix::fs::fcntl_setfl(&self.target, direct - rustix::fs::OFlags::DIRECT).unwrap();
        self.target.read_exact_at(&mut bytes, 0).unwrap();
        rustix::fs::fcntl_setfl(&self.target, direct).unwrap();
        assert_eq!(bytes.len(), self.model.len());
        let wrong = bytes.iter().zip(&self.model).position(|(got, wanted)| got != wanted);
        assert_eq!(wrong, None);
    }
}

#[test]
fn scattered_copies_of_every_alignment_arrive() {
    for cache in [Cache::Writeback, Cache::Writethrough, Cache::Unsafe, Cache::None, Cache::Directsync] {
        for unit in [512, 4096, 65536, 1000] {
            let mut b = bench([6 << 20, 5 << 20], 3 << 20, cache);
            let mut requests = Vec::new();
            let (mut to, mut number) = (unit, 0);
            while requests.len() < 120 && to < 12 << 20 {
                let length = unit * (1 + number * 5 % 40);
                let from = (number * 31 * unit) % (5 << 20);
                requests.push(Request::copy((number % 2) as u32, from, OUT, to, length));
                to += length + unit * (number % 3);
                number += 1;
            }
            assert!(requests.iter().map(|request| request.length).sum::<u64>() >= LEAST, "{unit}");
            b.run(&mut requests);
            b.check();
            assert!(b.devices.stats().copied_through_host > 0, "{cache:?} {unit}");
        }
    }
}

#[test]
fn later_requests_see_earlier_ones_and_overlaps_keep_their_order() {
    let mut b = bench([8 << 20, 8 << 20], 1 << 20, Cache::Writeback);
    b.run(&mut [
        Request::copy(0, 0, OUT, 0, 2 << 20),
        // Backwards, and over what has just been written.
        Request::copy(1, 4096, OUT, 1 << 20, 2 << 20),
        Request::copy(0, 3 << 20, OUT, (1 << 20) + 8192, 1 << 20),
        Request::flush(OUT),
        Request::copy(1, 0, OUT, 512, 3 << 20),
    ]);
    b.check();
    // From the target itself, also from where no block begins.
    let mut own = [Request::copy(0, 0, OUT, 0, 2 << 20), Request::copy(OUT, 100, OUT, 8 << 20, 2 << 20)];
    b.devices.execute(&NoMemory, &mut own).unwrap();
    assert!(own.iter().all(|request| request.status == request_status::OK), "{own:?}");
    b.apply(&own[0]);
    let copied = b.model[100..100 + (2 << 20)].to_vec();
    b.model.resize(10 << 20, 0);
    b.model[8 << 20..].copy_from_slice(&copied);
    b.check();
}

#[test]
fn holes_and_what_is_past_the_end_of_the_source_read_as_zeroes() {
    let mut b = bench([4 << 20, 3 << 20], 16 << 20, Cache::Writeback);
    let source = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let mut bytes = vec![0; 12 << 20];
    for at in [1 << 20, 5 << 20] {
        bytes[at..at + (2 << 20)].fill(0x5a);
        source.write_all_at(&bytes[at..at + (2 << 20)], at as u64).unwrap();
    }
    source.set_len(12 << 20).unwrap();
    b.devices.attach(0, Device::new(source, false, 12 << 20, 0, false));
    b.sources[0] = bytes;
    b.run(&mut [Request::copy(0, 0, OUT, 0, 12 << 20), Request::copy(1, 2 << 20, OUT, 13 << 20, 4 << 20)]);
    b.check();
    assert!(b.devices.stats().zeroed >= 8 << 20);
}

#[test]
fn a_failure_is_that_of_its_own_request() {
    let mut b = bench([8 << 20, 8 << 20], 8 << 20, Cache::Writeback);
    // A source that cannot be read.
    let only_written = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
    b.devices.attach(5, Device::new(only_written, false, 8 << 20, 0, true));
    let mut requests = [
        Request::copy(0, 0, OUT, 0, 3 << 20),
        Request::copy(1, 0, OUT, 3 << 20, 1 << 20),
        Request::copy(5, 0, OUT, 4 << 20, 2 << 20),
        Request::copy(0, 0, OUT, 7 << 20, 1 << 20),
    ];
    requests.iter_mut().for_each(|request| request.status = request_status::NOT_RUN);
    b.devices.execute(&NoMemory, &mut requests).unwrap();
    let statuses = requests.map(|request| request.status);
    assert_eq!(statuses, [request_status::OK, request_status::OK, libc::EBADF, request_status::NOT_RUN]);
    // What is complete is there, and the rest of the requests may or may not be.
    for request in &requests[..2] {
        b.apply(request);
    }
    let mut bytes = vec![0; 4 << 20];
    b.target.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == b.model[..4 << 20]);
}

#[test]
fn a_bad_request_behind_good_ones_ends_the_guest_after_them() {
    let mut b = bench([8 << 20, 8 << 20], 8 << 20, Cache::Writeback);
    let mut requests = [Request::copy(0, 0, OUT, 0, 2 << 20), Request::copy(0, 0, OUT, 8 << 20, ROOM + 1)];
    let error = b.devices.execute(&NoMemory, &mut requests).unwrap_err();
    assert!(error.0.contains("may grow"), "{}", error.0);
    b.apply(&requests[0]);
    b.check();
}

#[test]
fn the_operator_can_interrupt() {
    let mut b = bench([32 << 20, 8 << 20], 32 << 20, Cache::Writeback);
    let cancel = Cancel::new();
    cancel.cancel();
    b.devices.pace_mut().stop_when(cancel);
    let mut requests = [Request::copy(0, 0, OUT, 0, 32 << 20)];
    b.devices.execute(&NoMemory, &mut requests).unwrap();
    assert_eq!(requests[0].status, libc::EINTR);
}

#[test]
fn long_runs_of_whole_blocks_go_past_the_page_cache() {
    let (source, _) = file(4096, 1);
    let source = std::sync::Arc::new(source);
    let segment =
        |to: u64, length: u64| Segment { source: std::sync::Arc::clone(&source), from: to + 7, to, length, copy: 0 };
    let segments = vec![
        // A run of 16 segments of 64 KiB, one that is short, and a long one that fills no block at its ends.
        segment(65536, 65536 * 8),
        segment(65536 * 9, 65536 * 8),
        segment(65536 * 20, 65536),
        segment(65536 * 30 + 512, 1 << 20),
    ];
    let split = |way: Way| Plan { way, segments: segments.clone() }.split();
    let (buffered, direct) = split(Way::Either(4096));
    let end = 65536 * 30 + 512 + (1 << 20);
    assert_eq!(direct.iter().map(|segment| segment.length).sum::<u64>(), (1 << 20) * 2 - 4096);
    assert!(direct
        .iter()
        .all(|segment| segment.to % 4096 == 0 && segment.length % 4096 == 0 && segment.from == segment.to + 7));
    let edges = [(65536 * 20, 65536), (65536 * 30 + 512, 4096 - 512), (end - 512, 512)];
    assert_eq!(buffered.iter().map(|segment| (segment.to, segment.length)).collect::<Vec<_>>(), edges);
    assert_eq!((split(Way::Buffered).0.len(), split(Way::Direct(4096)).1.len()), (4, 4));
}
