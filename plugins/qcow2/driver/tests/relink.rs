//! A commit after which the overlay's children name the target: at every instant of a power loss, each child reads what it read
//! before, through whichever of the two it names then, and running it again finishes it.
#![allow(missing_docs, clippy::unwrap_used)]

use instar_guest_sdk::abi::{DeviceConfig, DeviceRole, ErrorCode, DEVICE_OUTPUT};
use instar_guest_sdk::commit::{commit_before_relinking, Commit, CommitFailure, Options, Step};
use instar_guest_sdk::conformance::{ImageKit, ParentKit};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{BlockIo, FormatDriver, Relinked, Relinks, Source};
use instar_guest_view::Ancestors;
use instar_qcow2_driver::Qcow2;
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::header::{with_header, BACKING_FORMAT};
use instar_qcow2_testkit::pair::data;
use instar_qcow2_testkit::{config, Kit};

const OVERLAY: u32 = 0;
const CHILDREN: [u32; 2] = [3, 4];
const SIZE: u64 = 6 << 9;

fn format() -> [(u32, Vec<u8>); 1] {
    [(BACKING_FORMAT, b"qcow2".to_vec())]
}

fn images() -> Files {
    let overlay = Spec::new(9, SIZE).with(data([0, 4], 0x21)).with([(1, State::Zero), (2, State::Deflated(3))]);
    let target = Spec::new(9, SIZE).with(data([0, 1, 5], 0x43));
    let child = |seed, cluster| {
        let spec = Spec::new(9, SIZE).with(data([cluster], seed));
        with_header(build(&spec), &format(), 8, b"overlay.qcow2")
    };
    Files::from([
        (OVERLAY, with_header(build(&overlay), &format(), 8, b"base.qcow2")),
        (DEVICE_OUTPUT, build(&target)),
        (CHILDREN[0], child(0x71, 0)),
        (CHILDREN[1], child(0x72, 3)),
    ])
}

/// What each child reads, through the image that it names.
fn seen(files: &Files) -> Vec<Vec<u8>> {
    let target = Kit.content(&files[&DEVICE_OUTPUT], None);
    let overlay = Kit.content(&files[&OVERLAY], Some(&target));
    let of_child = |number: &u32| {
        let recorded = Kit.recorded(&files[number]).unwrap();
        assert_eq!(recorded.format.as_deref(), Some(&b"qcow2"[..]));
        let below = match recorded.names[0].as_slice() {
            b"overlay.qcow2" => &overlay,
            b"base.qcow2" => &target,
            other => unreachable!("it names {}", String::from_utf8_lossy(other)),
        };
        Kit.content(&files[number], Some(below))
    };
    CHILDREN.iter().map(of_child).collect()
}

fn names_the_target(files: &Files) -> usize {
    let named = CHILDREN.iter().filter(|number| Kit.recorded(&files[number]).unwrap().names[0] == b"base.qcow2");
    named.count()
}

fn run(io: &mut MemoryDevices, keep_overlay: bool, name: &[u8]) -> Result<(), CommitFailure> {
    let device = |number: u32| config(io, number);
    let (overlay, target, devices) = (device(OVERLAY), device(DEVICE_OUTPUT), CHILDREN.map(device));
    let top = DeviceRole::Overlay { emptied: !keep_overlay, identity: false };
    let children = devices.iter().map(|child| (DeviceRole::Child, child));
    io.hold([(top, &overlay), (DeviceRole::Target, &target)].into_iter().chain(children));
    let at = |error| CommitFailure { step: Step::Check, error };
    let mut source = Qcow2::open_source(io, &overlay).map_err(at)?;
    let mut sink = Qcow2::open_sink(io, &target, false).map_err(at)?;
    let child = |device: &DeviceConfig| {
        let (number, device) = (device.device, *device);
        let open = move |io: &mut dyn BlockIo| Ok(Box::new(Qcow2::open_source(io, &device)?) as Box<dyn Source>);
        Relinked { open: Box::new(open), device: number, name }
    };
    let children: Vec<Relinked<'_>> = devices.iter().map(child).collect();
    let mut relinks = Relinks::new(&children, "qcow2", None);
    let mut below = Ancestors::new(Vec::<Box<dyn Source>>::new());
    let mut images = Commit { source: &mut source, sink: &mut sink, below: &mut below };
    let options = Options { keep_overlay, ..Options::default() };
    commit_before_relinking(io, &mut images, &mut relinks, options, &mut |_| {})?;
    // The step is of no interest to the tests that come here.
    relinks.set(io, &mut |_| {}).map_err(|error| CommitFailure { step: Step::Empty, error })
}

#[test]
fn every_crash_point_leaves_children_that_read_the_same() {
    for keep_overlay in [false, true] {
        let before = images();
        let expected = seen(&before);
        let mut io = MemoryDevices::new(before.clone());
        run(&mut io, keep_overlay, b"base.qcow2").unwrap();
        assert_eq!((seen(&io.files), names_the_target(&io.files)), (expected.clone(), 2));
        assert!(io.unflushed().is_empty());

        let mut halfway = 0;
        let states = Crashes { drawn: 1, seed: 1 }.each(&before, &io.log, &mut |files| {
            assert!(seen(&files) == expected, "a child reads something else");
            halfway += usize::from(names_the_target(&files) == 1);
            let mut again = MemoryDevices::new(files);
            run(&mut again, keep_overlay, b"base.qcow2").unwrap();
            assert!(seen(&again.files) == expected && names_the_target(&again.files) == 2);
        });
        assert!(states > 20 && halfway > 0, "{states} states, {halfway} between two children");

        for request in 0..io.executed() {
            let mut failing = MemoryDevices::new(before.clone());
            failing.fail_at = Some(request);
            let result = run(&mut failing, keep_overlay, b"base.qcow2");
            assert!(seen(&failing.files) == expected, "request {request}: {result:?}");
            if matches!(&result, Err(failure) if matches!(failure.step, Step::Check | Step::Plan)) {
                assert!(failing.log.is_empty());
            }
        }
    }
}

#[test]
fn a_child_that_cannot_name_the_target_refuses_all_of_it() {
    let before = images();
    let mut io = MemoryDevices::new(before.clone());
    let failure = run(&mut io, false, &[b'n'; 600]).unwrap_err();
    assert_eq!((failure.step, failure.error.code), (Step::Plan, ErrorCode::UnsupportedFormat));
    assert_eq!((failure.error.device, io.files == before), (Some(CHILDREN[0]), true));
    assert!(io.log.is_empty());
}
