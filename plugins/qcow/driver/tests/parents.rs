//! Another backing file: at every instant the header names the one or the other.
#![allow(missing_docs, clippy::unwrap_used)]

use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode};
use instar_guest_sdk::conformance::{verify_odd_parents, verify_parent, verify_parents, ImageKit};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::Parent;
use instar_qcow_testkit::{build, crashes, device, put64, Kit, Spec, State, CLUSTER};

const SIZE: usize = 9 * CLUSTER - 512;
const BASE: Parent<'_> = Parent { name: b"base.qcow", format: "qcow", identity: None, virtual_size: 8 << 10 };
const LONGER: Parent<'_> = Parent { name: b"a much longer name/than the one before.qcow2", format: "qcow2", ..BASE };

fn spec(name: &[u8]) -> Spec {
    Spec::new(SIZE, name).with([(0, State::Data(0x21)), (1, State::Packed(0x22)), (8, State::Data(0x23))])
}

#[test]
fn names_that_fit_and_names_that_do_not() {
    for name in [&b"original name"[..], b"o", b"", &[b'n'; 700]] {
        for tail in [0, 77, 5 * CLUSTER] {
            let (report, image) = verify_parents(
                &Kit,
                &build(&Spec { tail, ..spec(name) }),
                &[BASE, LONGER, Parent { name: b"base", ..BASE }],
                crashes(),
            );
            assert!(report.changed == 5 && report.refused == 0 && report.states > 6, "{report:?}");
            // Nothing of the names of before is left.
            assert!(!image
                .windows(8)
                .any(|bytes| bytes == b"original" || bytes == b"much lon" || bytes == b"nnnnnnnn"));
        }
    }
    // One that fits needs no room.
    let image = build(&spec(b"original name"));
    assert_eq!(verify_parent(&Kit, &image, Some(&BASE), crashes()).unwrap().1.len(), image.len());
}

#[test]
fn what_a_qcow_cannot_name_is_refused() {
    let image = build(&spec(b"original"));
    // Three names that are too long, an empty one, one with a zero byte.
    assert_eq!(verify_odd_parents(&Kit, &image, &BASE, crashes()), 5);
    let error = verify_parent(&Kit, &image, Some(&Parent { format: "raw", ..BASE }), crashes()).unwrap_err();
    assert!(error.code == ErrorCode::UnsupportedFormat && error.text.contains("is raw"), "{error}");
    let mut damaged = image;
    let table = CLUSTER;
    put64(&mut damaged, table + 16, 1 << 40);
    let mut io = MemoryDevices::new([(0, damaged.clone())]);
    let mut source = Kit.open_source(&mut io, &device(0, &damaged, u64::MAX)).unwrap();
    assert_eq!(source.plan_parent(&mut io, Some(&BASE)).unwrap_err().code, ErrorCode::OverlayCorrupt);
}

#[test]
fn a_device_keeps_its_length() {
    let plan = |tail| {
        let image = build(&Spec { tail, ..spec(b"o") });
        let flags = device_flags::FIXED_LENGTH;
        let config = DeviceConfig { flags, ..device(0, &image, image.len() as u64) };
        let mut io = MemoryDevices::new([(0, image)]);
        let mut source = Kit.open_source(&mut io, &config).unwrap();
        source.plan_parent(&mut io, Some(&BASE)).map_err(|error| error.code)
    };
    assert_eq!(plan(0), Err(ErrorCode::NoSpace));
    assert_eq!(plan(1024), Ok(()));
}
