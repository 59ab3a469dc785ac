#![allow(clippy::unwrap_used)]

use super::*;
use crate::devices::{Device, Devices};
use crate::image::Access;
use crate::sandbox::{BufferAccess, VolatileSlice};
use crate::undo::{sources, Source};
use instar_guest_abi::{request_status, DeviceRole, Phase, Request, DEVICE_OUTPUT};
use std::cell::RefCell;
use std::fs;
use std::rc::Rc;

const SOURCE: u32 = 0;

struct NoMemory;

impl BufferAccess for NoMemory {
    fn heap_slice(&self, _: u64, _: u64) -> Option<VolatileSlice<'_>> {
        None
    }
}

struct Lab {
    directory: tempfile::TempDir,
    before: Vec<u8>,
    log: Rc<RefCell<UndoLog>>,
    devices: Devices,
    /// The overlay, in a directory of its own.
    top: tempfile::NamedTempFile,
}

impl Lab {
    /// A target with a hole in the middle, whose length is no whole block.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("base");
        let mut before: Vec<u8> = (0..70_000_u32).map(|at| (at % 251) as u8 + 1).collect();
        before[20_480..40_960].fill(0);
        fs::write(&path, &before).unwrap();
        let opened = OpenedFile::named(&path, Access::ReadWrite, ErrorCode::ImageNotFound).unwrap();
        rustix::fs::fallocate(
            opened.file.file(),
            rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
            20_480,
            20_480,
        )
        .unwrap();
        let (holder, name) = opened.place().unwrap();
        let top = tempfile::NamedTempFile::new().unwrap();
        let overlay = OpenedFile::named(top.path(), Access::ReadOnly, ErrorCode::ImageNotFound).unwrap();
        let sources = Sources::of_files(std::iter::once(&overlay)).unwrap();
        let log = Rc::new(RefCell::new(UndoLog::begin(&opened, (&holder, &name), None, sources).unwrap()));
        let source = tempfile::tempfile().unwrap();
        source.write_all_at(&[0xee; 100_000], 0).unwrap();
        let mut devices = Devices::new();
        devices.attach(SOURCE, Device::new(source, false, 100_000, 100_000, false).with_role(DeviceRole::Read));
        let target = opened.file.into_file();
        devices.attach(DEVICE_OUTPUT, Device::new(target, true, 70_000, 200_000, false).with_role(DeviceRole::Target));
        devices.ask_before_change(log.clone());
        devices.enter(Phase::Target).unwrap();
        Self { directory, before, log, devices, top }
    }

    fn run(&mut self, mut requests: Vec<Request>) {
        self.devices.execute(&NoMemory, &mut requests).unwrap();
        assert!(requests.iter().all(|request| request.status == request_status::OK), "{requests:?}");
    }

    fn now(&self) -> Vec<u8> {
        fs::read(self.directory.path().join("base")).unwrap()
    }

    fn names(&self) -> usize {
        fs::read_dir(self.directory.path()).unwrap().count()
    }
}

fn copy(from: u64, to: u64, length: u64) -> Request {
    Request::copy(SOURCE, from, DEVICE_OUTPUT, to, length)
}

#[test]
fn whatever_changes_is_undone() {
    let mut lab = Lab::new();
    assert_eq!(lab.names(), 1, "nothing is there before the first change");
    lab.run(vec![copy(0, 100, 10), Request::zero(DEVICE_OUTPUT, 8192, 5000), copy(7, 30_000, 9000)]);
    assert_eq!(lab.names(), 2);
    // Again, over what is kept, and beyond it.
    lab.run(vec![copy(3, 0, 16_000), Request::flush(DEVICE_OUTPUT)]);
    lab.run(vec![Request::set_length(DEVICE_OUTPUT, 50_000)]);
    lab.run(vec![Request::set_length(DEVICE_OUTPUT, 90_000), copy(1, 60_000, 30_000)]);
    assert_ne!(lab.now(), lab.before);
    let log = lab.directory.path().join(".base.instar-undo");
    // What another process finds after a crash.
    let crashed = fs::File::open(&log).unwrap();
    assert_eq!(Log::read(&crashed).unwrap().header().length, 70_000);
    assert_eq!(lab.log.borrow_mut().undo(), super::super::AS_IT_WAS);
    assert_eq!((lab.now() == lab.before, lab.names()), (true, 1));
}

#[test]
fn a_block_is_kept_once() {
    let mut lab = Lab::new();
    lab.run(vec![copy(0, 4096, 4096)]);
    let length = || fs::metadata(lab.directory.path().join(".base.instar-undo")).unwrap().len();
    let one = length();
    assert_eq!(one, FIRST + (crate::undo::SOURCE + crate::undo::RECORD) as u64 + 4096);
    let mut lab = Lab { ..lab };
    lab.run(vec![copy(0, 5000, 100), copy(50, 4096, 4096), Request::zero(DEVICE_OUTPUT, 4096, 4096)]);
    assert_eq!(fs::metadata(lab.directory.path().join(".base.instar-undo")).unwrap().len(), one);
    // What is new in the file is not kept.
    lab.run(vec![copy(0, 80_000, 10_000)]);
    assert_eq!(fs::metadata(lab.directory.path().join(".base.instar-undo")).unwrap().len(), one);
}

#[test]
fn a_complete_target_stays() {
    let mut lab = Lab::new();
    lab.run(vec![copy(0, 0, 70_000), Request::flush(DEVICE_OUTPUT)]);
    let held = fs::File::open(lab.directory.path().join(".base.instar-undo")).unwrap();
    lab.log.borrow_mut().complete().unwrap();
    assert_eq!((lab.now(), lab.names()), (vec![0xee; 70_000], 1));
    assert_eq!(held.metadata().unwrap().len(), 0, "also under another name, it undoes nothing");
}

#[test]
fn what_cannot_be_kept_is_not_changed() {
    let mut lab = Lab::new();
    // Somebody has put something there.
    fs::write(lab.directory.path().join(".base.instar-undo"), "mine").unwrap();
    let mut requests = [copy(0, 0, 10)];
    lab.devices.execute(&NoMemory, &mut requests).unwrap();
    assert_eq!(requests[0].status, libc::EEXIST);
    assert!(lab.log.borrow().failure().unwrap().to_string().contains("cannot be kept"));
    assert_eq!(lab.now(), lab.before);
    assert_eq!(fs::read(lab.directory.path().join(".base.instar-undo")).unwrap(), b"mine");
}

#[test]
fn the_log_says_what_the_overlay_was_when_the_target_began_to_change() {
    let mut lab = Lab::new();
    let look = |lab: &Lab| Source::look(lab.top.as_file(), lab.top.path(), 0, [0; 32]).unwrap();
    // An overlay records what identity its parent is about to get.
    fs::write(lab.top.path(), "its parent becomes another").unwrap();
    let then = look(&lab);
    lab.run(vec![copy(0, 4096, 4096)]);
    let path = lab.directory.path().join(".base.instar-undo");
    let said = || sources(&fs::File::open(&path).unwrap());
    assert_eq!(said().unwrap(), std::slice::from_ref(&then));
    fs::write(lab.top.path(), "another commit has emptied it").unwrap();
    lab.run(vec![copy(0, 60_000, 4096)]);
    assert_eq!(said().unwrap(), std::slice::from_ref(&then), "it is said once");
    assert!(then.difference(&look(&lab)).is_some());
    // A log that is damaged there is none.
    let mut bytes = fs::read(&path).unwrap();
    bytes[usize::try_from(FIRST).unwrap() + 200] ^= 1;
    fs::write(&path, bytes).unwrap();
    let damaged = fs::File::open(&path).unwrap();
    assert!(Log::read(&damaged).unwrap_err().to_string().contains("committed images"));
}
