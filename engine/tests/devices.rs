//! The block mover and the locks, on real files and against real QEMU programs.

#![allow(clippy::unwrap_used, clippy::panic)]

use instar_engine::devices::lock::{lock, LockMode, Locked};
use instar_engine::devices::{Access, BlockMover, CacheMode, Device, DeviceSet, ImageFile};
use instar_engine::vm::{BadRequest, BufferAccess};
use instar_guest_abi::{request_status, Request, DEVICE_OUTPUT};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

const HEAP: u64 = 0x20_0000;
const HEAP_SIZE: u64 = 1 << 20;

struct Memory(MmapRegion);

impl Memory {
    fn new() -> Self {
        Self(MmapRegion::new(usize::try_from(HEAP_SIZE).unwrap()).unwrap())
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.heap_slice(HEAP + at, bytes.len() as u64).unwrap().copy_from(bytes);
    }

    fn get(&self, at: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.heap_slice(HEAP + at, length).unwrap().copy_to(&mut bytes[..]);
        bytes
    }
}

impl BufferAccess for Memory {
    fn heap_slice(&self, address: u64, length: u64) -> Option<VolatileSlice<'_>> {
        let start = address.checked_sub(HEAP)?;
        start.checked_add(length).filter(|&end| end <= HEAP_SIZE)?;
        self.0.get_slice(usize::try_from(start).ok()?, usize::try_from(length).ok()?).ok()
    }
}

/// Overlay in slot 0 (10,000 bytes, bound 12,288), a read-only ancestor in slot 1 (5,000), the output (20,000, bound 40,000).
struct Host {
    dir: TempDir,
    memory: Memory,
    mover: BlockMover,
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from((i * 11 + seed + i / 253) % 255 + 1).unwrap()).collect()
}

impl Host {
    fn new() -> Self {
        Self::with(CacheMode::Writeback, || false)
    }

    fn with(cache: CacheMode, stop: fn() -> bool) -> Self {
        let dir = TempDir::new().unwrap();
        let open = |name: &str, length, access| {
            let path = dir.path().join(name);
            std::fs::write(&path, pattern(length, length)).unwrap();
            ImageFile::open(&path, access).unwrap()
        };
        let overlay = Device::writable(open("overlay", 10_000, Access::ReadWrite), 12_288);
        let ancestor = Device::read_only(open("ancestor", 5_000, Access::ReadOnly));
        let output = Device::writable(open("output", 20_000, Access::ReadWrite), 40_000);
        let devices = DeviceSet::new(vec![overlay, ancestor], Some(output));
        Self { dir, memory: Memory::new(), mover: BlockMover::new(devices, cache, stop) }
    }

    fn run(&mut self, requests: &mut [Request]) -> Result<(), BadRequest> {
        self.mover.execute(&self.memory, requests)
    }

    fn ok(&mut self, requests: &mut [Request]) {
        self.run(requests).unwrap();
        assert!(requests.iter().all(|request| request.status == request_status::OK), "{requests:?}");
    }

    fn content(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.path().join(name)).unwrap()
    }

    fn all(&self) -> [Vec<u8>; 3] {
        ["overlay", "ancestor", "output"].map(|name| self.content(name))
    }
}

fn with(mut request: Request, change: impl FnOnce(&mut Request)) -> Request {
    change(&mut request);
    request
}

#[test]
fn requests_that_break_a_rule_end_the_guest_and_change_nothing() {
    let out = DEVICE_OUTPUT;
    let max = i64::MAX.unsigned_abs();
    let cases = [
        ("unknown operation 0", Request::default()),
        ("unknown operation 7", with(Request::flush(0), |r| r.op = 7)),
        ("unknown flags", with(Request::flush(0), |r| r.flags = 1)),
        ("unknown flags", with(Request::read(0, 0, HEAP, 1), |r| r.flags = 1)),
        ("unknown flags", with(Request::zero(0, 0, 1), |r| r.flags = 2)),
        ("reserved", with(Request::flush(0), |r| r.reserved0 = 1)),
        ("reserved", with(Request::flush(0), |r| r.reserved1 = 1)),
        ("not there", Request::read(2, 0, HEAP, 1)),
        ("not there", Request::flush(15)),
        ("not there", Request::flush(17)),
        ("not there", Request::set_length(u32::MAX, 0)),
        ("not there", Request::copy(3, 0, out, 0, 1)),
        ("read-only", Request::write(1, 0, HEAP, 1)),
        ("read-only", Request::copy(0, 0, 1, 0, 1)),
        ("read-only", Request::zero(1, 0, 1)),
        ("read-only", Request::discard(1, 0, 1)),
        ("read-only", Request::set_length(1, 1)),
        ("overlap", Request::copy(out, 0, out, 99, 100)),
        ("overlap", Request::copy(out, 99, out, 0, 100)),
        ("overlap", Request::copy(0, 0, 0, 0, 1)),
        ("out of range", Request::read(0, u64::MAX, HEAP, 2)),
        ("out of range", Request::read(0, max, HEAP, 1)),
        ("out of range", Request::write(out, max, HEAP, 1)),
        ("out of range", Request::zero(out, 1, max)),
        ("out of range", Request::copy(0, max, out, 0, 1)),
        ("out of range", Request::copy(0, u64::MAX, out, 0, 1)),
        ("out of range", Request::set_length(out, max + 1)),
        ("outside the heap", Request::read(0, 0, HEAP - 1, 1)),
        ("outside the heap", Request::read(0, 0, HEAP, HEAP_SIZE + 1)),
        ("outside the heap", Request::write(0, 0, HEAP + HEAP_SIZE, 1)),
        ("outside the heap", Request::write(0, 0, u64::MAX, 1)),
        ("may not grow", Request::write(0, 12_288, HEAP, 1)),
        ("may not grow", Request::write(out, 39_999, HEAP, 2)),
        ("may not grow", Request::copy(0, 0, out, 39_999, 2)),
        ("may not grow", Request::set_length(out, 40_001)),
        ("may not grow", Request::set_length(0, 12_289)),
    ];
    let mut host = Host::new();
    let before = host.all();
    for (words, request) in cases {
        // A good request before it is not executed either.
        let mut requests = [Request::zero(0, 0, 100), request];
        let BadRequest(text) = host.run(&mut requests).unwrap_err();
        assert!(text.contains(words), "{request:?}: {text}");
        assert!(requests.iter().all(|request| request.status == request_status::NOT_RUN));
    }
    assert!(host.all() == before);
}

#[test]
fn requests_at_the_edge_of_the_rules_are_executed() {
    let out = DEVICE_OUTPUT;
    let mut host = Host::new();
    host.ok(&mut [
        Request::read(1, i64::MAX.unsigned_abs() - 1, HEAP, 1),
        Request::read(0, 0, HEAP + HEAP_SIZE, 0),
        Request::write(out, 39_999, HEAP, 1),
        Request::write(0, 12_287, HEAP, 1),
        Request::zero(out, 30_000, 1 << 40),
        Request::copy(out, 0, out, 100, 100),
        Request::copy(1, 1 << 40, out, 200, 100),
        Request::flush(1),
        Request::set_length(out, 40_000),
    ]);
    assert_eq!(host.content("output").len(), 40_000);
    assert_eq!(host.content("output")[100..200], host.content("output")[..100]);
    assert!(host.content("output")[200..300].iter().all(|&b| b == 0));
}

#[test]
fn reads_go_into_guest_memory_and_are_merged() {
    let mut host = Host::new();
    host.memory.put(0, &[0xee; 8192]);
    let at = |i: u64| HEAP + (7 - i) * 1000;
    let mut requests: Vec<Request> = (0..8).map(|i| Request::read(1, 500 + i * 700, at(i), 700)).collect();
    host.ok(&mut requests);
    let mut expected = pattern(5_000, 5_000);
    expected.resize(10_000, 0);
    for i in 0..8u64 {
        let from = usize::try_from(500 + i * 700).unwrap();
        assert!(host.memory.get((7 - i) * 1000, 700) == expected[from..from + 700], "{i}");
        assert!(host.memory.get((7 - i) * 1000 + 700, 300).iter().all(|&b| b == 0xee));
    }
    let stats = host.mover.stats();
    assert_eq!(stats.guest_read, 5_600);
    assert!(stats.calls <= 3, "{stats:?}");
}

#[test]
fn writes_are_merged_and_keep_their_order() {
    let mut host = Host::new();
    host.memory.put(0, &pattern(4096, 3));
    let mut requests: Vec<Request> =
        (0..100).map(|i| Request::write(DEVICE_OUTPUT, 19_000 + i * 40, HEAP + i * 40, 40)).collect();
    requests.push(Request::write(DEVICE_OUTPUT, 19_000, HEAP + 4000, 8));
    requests.push(Request::flush(DEVICE_OUTPUT));
    requests.push(Request::flush(DEVICE_OUTPUT));
    host.ok(&mut requests);
    let mut expected = pattern(20_000, 20_000);
    expected.resize(23_000, 0);
    expected[19_000..].copy_from_slice(&pattern(4096, 3)[..4000]);
    expected[19_000..19_008].copy_from_slice(&pattern(4096, 3)[4000..4008]);
    assert!(host.content("output") == expected);
    let stats = host.mover.stats();
    assert_eq!((stats.calls, stats.guest_written, stats.flushes, stats.flushes_skipped), (2, 4008, 1, 1));
    let output = host.mover.devices().get(DEVICE_OUTPUT).unwrap();
    assert!(output.is_changed() && output.length() == 23_000);
    assert!(!host.mover.devices().get(0).unwrap().is_changed());
}

#[test]
fn copies_are_merged_unless_one_reads_what_another_wrote() {
    let out = DEVICE_OUTPUT;
    let mut host = Host::new();
    let mut requests: Vec<Request> =
        (0..10).map(|i| Request::copy(0, i * 1000, out, 20_000 + i * 1000, 1000)).collect();
    host.ok(&mut requests);
    assert!(host.content("output")[20_000..] == pattern(10_000, 10_000));
    let stats = host.mover.stats();
    assert_eq!((stats.calls, stats.kernel_copied + stats.host_copied), (1, 10_000));
    // Each goes on from the other, and together they would overlap.
    host.ok(&mut [Request::copy(out, 0, out, 100, 100), Request::copy(out, 100, out, 200, 100)]);
    let found = host.content("output");
    assert!(found[..100] == found[100..200] && found[..100] == found[200..300]);
}

#[test]
fn zeroes_discards_and_lengths() {
    let out = DEVICE_OUTPUT;
    let mut host = Host::new();
    host.ok(&mut [
        Request::zero(out, 100, 50),
        Request::zero(out, 150, 50),
        Request::zero(out, 19_900, 5_000),
        Request::discard(out, 4096, 4096),
    ]);
    let found = host.content("output");
    assert_eq!(found.len(), 20_000, "never longer");
    assert!(found[100..200].iter().chain(&found[19_900..]).all(|&b| b == 0) && found[99] != 0 && found[200] != 0);
    host.ok(&mut [
        Request::set_length(out, 1_000),
        Request::read(out, 0, HEAP, 2_000),
        Request::set_length(out, 3_000),
    ]);
    assert!(host.memory.get(1_000, 1_000).iter().all(|&b| b == 0));
    assert_eq!(host.content("output").len(), 3_000);
}

#[test]
fn cache_mode_unsafe_skips_flushes() {
    let mut host = Host::with(CacheMode::Unsafe, || false);
    host.ok(&mut [Request::zero(0, 0, 1), Request::flush(0)]);
    assert_eq!((host.mover.stats().flushes, host.mover.stats().flushes_skipped), (0, 1));
}

#[test]
fn an_interruption_stops_long_steps() {
    let mut host = Host::with(CacheMode::Writeback, || true);
    let mut requests = [Request::copy(0, 0, DEVICE_OUTPUT, 0, 100), Request::flush(0)];
    host.run(&mut requests).unwrap();
    assert_eq!(requests.map(|r| r.status), [libc::EINTR, request_status::NOT_RUN]);
}

/// A file that may not grow past 4096 bytes: writes beyond fail in the host.
fn sealed() -> ImageFile {
    let fd = rustix::fs::memfd_create("sealed", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, 4096).unwrap();
    rustix::fs::fcntl_add_seals(&fd, rustix::fs::SealFlags::GROW).unwrap();
    ImageFile::from_fd(fd, PathBuf::from("sealed"), Access::ReadWrite).unwrap()
}

#[test]
fn the_request_that_failed_gets_the_errno() {
    let devices = DeviceSet::new(vec![Device::writable(sealed(), 1 << 20)], None);
    let memory = Memory::new();
    memory.put(0, &pattern(8192, 1));
    let mut mover = BlockMover::new(devices, CacheMode::Writeback, || false);
    // Merged into one call, which fails in the middle.
    let mut requests: Vec<Request> = (0..4).map(|i| Request::write(0, i * 2048, HEAP + i * 2048, 2048)).collect();
    mover.execute(&memory, &mut requests).unwrap();
    let ok = request_status::OK;
    assert_eq!(requests.iter().map(|r| r.status).collect::<Vec<_>>(), [ok, ok, libc::EPERM, request_status::NOT_RUN]);
    assert_eq!(mover.devices().get(0).unwrap().length(), 4096);
    let mut requests = [Request::flush(0), Request::set_length(0, 8192), Request::flush(0)];
    mover.execute(&memory, &mut requests).unwrap();
    assert_eq!(requests.map(|r| r.status), [ok, libc::EPERM, request_status::NOT_RUN]);
}

fn loop_device(file: &Path) -> Option<PathBuf> {
    let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
    let name = String::from_utf8(output.stdout).unwrap();
    output.status.success().then(|| PathBuf::from(name.trim()))
}

#[test]
fn a_block_device_keeps_its_length() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, pattern(1 << 20, 5)).unwrap();
    let Some(device) = loop_device(&path) else {
        eprintln!("skipped: no loop devices here");
        return;
    };
    let image = ImageFile::open(&device, Access::ReadWrite).unwrap();
    assert!(image.is_block_device() && image.initial_length() == 1 << 20);
    let mut mover =
        BlockMover::new(DeviceSet::new(vec![Device::writable(image, 1 << 30)], None), CacheMode::Writeback, || false);
    let memory = Memory::new();
    let mut requests = [
        Request::zero(0, 512, 100),
        Request::zero(0, 65_536, 65_536),
        Request::copy(0, 0, 0, 131_072, 4096),
        Request::discard(0, 262_144, 4096),
        Request::set_length(0, 4096),
        Request::flush(0),
    ];
    let result = mover.execute(&memory, &mut requests);
    let beyond = mover.execute(&memory, &mut [Request::write(0, 1 << 20, HEAP, 1)]);
    drop(mover);
    let content = std::fs::read(&device).unwrap();
    let detached = Command::new("losetup").arg("--detach").arg(&device).status().unwrap();
    assert!(detached.success());
    result.unwrap();
    assert!(requests.iter().all(|r| r.status == request_status::OK), "{requests:?}");
    assert!(beyond.is_err());
    assert_eq!(content.len(), 1 << 20);
    assert!(content[512..612].iter().chain(&content[65_536..131_072]).all(|&b| b == 0));
    assert!(content[611] == 0 && content[612] != 0 && content[131_072..131_072 + 4096] == content[..4096]);
}

fn qcow2(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    let status = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status().unwrap();
    assert!(status.success());
    path
}

/// Whether a `qemu-io` may open the image, and what it says.
fn qemu_io(path: &Path, read_only: bool) -> (bool, String) {
    let mut command = Command::new("qemu-io");
    if read_only {
        command.arg("-r");
    }
    let output = command.args(["-c", "read 0 512"]).arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    (output.status.success() && !text.contains("Failed to get"), text)
}

#[test]
fn what_is_locked_here_qemu_refuses() {
    let dir = TempDir::new().unwrap();
    let path = qcow2(dir.path(), "image");
    let image = ImageFile::open(&path, Access::ReadWrite).unwrap();
    assert_eq!(lock(&image, LockMode::Write), Ok(Locked::Held));
    for read_only in [false, true] {
        let (opened, text) = qemu_io(&path, read_only);
        assert!(!opened && text.contains("lock"), "{text}");
    }
    drop(image);
    let image = ImageFile::open(&path, Access::ReadOnly).unwrap();
    assert_eq!(lock(&image, LockMode::Read), Ok(Locked::Held));
    assert!(!qemu_io(&path, false).0);
    assert!(qemu_io(&path, true).0);
    drop(image);
    assert!(qemu_io(&path, false).0);
}

#[test]
fn what_qemu_uses_is_refused_here() {
    let dir = TempDir::new().unwrap();
    let path = qcow2(dir.path(), "image");
    for (read_only, mode, words) in [
        (false, LockMode::Write, "Failed to get \"write\" lock"),
        (false, LockMode::Read, "Failed to get shared \"write\" lock"),
        (true, LockMode::Write, "Failed to get \"write\" lock"),
    ] {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        let mut child = command.arg(&path).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let started = Instant::now();
        let refused = loop {
            let file = ImageFile::open(&path, Access::ReadWrite).unwrap();
            match lock(&file, mode) {
                Err(refused) => break refused.to_string(),
                Ok(_) => assert!(started.elapsed() < Duration::from_secs(20), "qemu-io takes no lock"),
            }
            // While the lock is held here, qemu-io may not open the image.
            drop(file);
            if child.try_wait().unwrap().is_some() {
                panic!("qemu-io ended");
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        assert!(refused.contains(words), "{refused}");
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}

#[test]
fn a_sparse_file_stays_sparse_through_the_mover() {
    let mut host = Host::new();
    let path = host.dir.path().join("sparse");
    let file = File::create_new(&path).unwrap();
    file.set_len(256 << 20).unwrap();
    file.write_all_at(b"data", 100 << 20).unwrap();
    let target = host.dir.path().join("target");
    File::create_new(&target).unwrap();
    let layers = vec![Device::read_only(ImageFile::open(&path, Access::ReadOnly).unwrap())];
    let output = Device::writable(ImageFile::open(&target, Access::ReadWrite).unwrap(), 1 << 30);
    host.mover = BlockMover::new(DeviceSet::new(layers, Some(output)), CacheMode::Writeback, || false);
    host.ok(&mut [Request::copy(0, 0, DEVICE_OUTPUT, 0, 256 << 20)]);
    let metadata = std::fs::metadata(&target).unwrap();
    assert_eq!(metadata.len(), 256 << 20);
    assert!(metadata.blocks() * 512 <= 1 << 20, "{}", metadata.blocks());
    let mut found = [0; 4];
    File::open(&target).unwrap().read_exact_at(&mut found, 100 << 20).unwrap();
    assert_eq!(&found, b"data");
}
