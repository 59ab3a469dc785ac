//! Another parent: at every instant the header has the UUIDs of the one or the other.
#![allow(missing_docs, clippy::unwrap_used)]

use instar_guest_sdk::abi::{ErrorCode, ImageId};
use instar_guest_sdk::conformance::{verify_odd_parents, verify_parent, verify_parents};
use instar_guest_sdk::Parent;
use instar_vdi_testkit::{build, crashes, identity, put32, Kit, Spec, State, BLOCK};

const SIZE: usize = 12 * BLOCK - 512;

fn parent(number: u8) -> Parent<'static> {
    let identity = ImageId::new(&identity(number).concat());
    Parent { name: b"base.vdi", format: "vdi", identity, virtual_size: SIZE as u64 }
}

fn image(parent: u8) -> Spec {
    Spec::new(SIZE, 5, parent).with([(0, State::Data(0x21)), (2, State::Zero), (11, State::Data(0x23))])
}

#[test]
fn both_uuids_and_the_type_go_together() {
    for before in [0, 3] {
        let (report, _) = verify_parents(&Kit, &build(&image(before)), &[parent(1), parent(2)], crashes());
        assert!(report.changed == 4 && report.refused == 0 && report.states >= 8, "{report:?}");
    }
    // A parent that was announced to change is another one now.
    let mut announced = build(&image(3));
    put32(&mut announced, 364, 1 << 31);
    assert!(verify_parent(&Kit, &announced, Some(&parent(1)), crashes()).is_ok());
}

#[test]
fn what_a_vdi_cannot_record_is_refused() {
    let image = build(&image(3));
    // Formats that do not exist, and a parent without identity; a name is not recorded.
    assert_eq!(verify_odd_parents(&Kit, &image, &parent(1), crashes()), 3);
    let null = ImageId::new(&[0; 32]);
    let short = ImageId::new(&[1; 31]);
    for wrong in [
        Parent { format: "qcow2", ..parent(1) },
        Parent { identity: null, ..parent(1) },
        Parent { identity: short, ..parent(1) },
    ] {
        let error = verify_parent(&Kit, &image, Some(&wrong), crashes()).unwrap_err();
        assert_eq!(error.code, ErrorCode::UnsupportedFormat, "{error}");
    }
    let whole = build(&Spec::new(SIZE, 5, 0).preallocated());
    let error = verify_parent(&Kit, &whole, Some(&parent(1)), crashes()).unwrap_err();
    assert!(error.text.contains("static"), "{error}");
}
