//! Another backing file: at every instant the header names the one or the other, with its own format.
#![allow(missing_docs, clippy::unwrap_used)]

use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::conformance::{verify_odd_parents, verify_parent, verify_parents, ParentKit};
use instar_guest_sdk::crash::Crashes;
use instar_guest_sdk::Parent;
use instar_qcow2_testkit::bitmaps::{extension, BitmapSpec, Bits};
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::header::{extensions, with_header, BACKING_FORMAT, FEATURE_NAMES};
use instar_qcow2_testkit::pair::data;
use instar_qcow2_testkit::Kit;

const CRASHES: Crashes = Crashes { drawn: 1, seed: 1 };
const UNKNOWN: u32 = 0x1234_5678;
const BASE: Parent<'_> = Parent { name: b"base.qcow2", format: "qcow2", identity: None, virtual_size: 6 << 10 };
const PLAIN: Parent<'_> = Parent { name: b"a much longer name/than before.raw", format: "raw", ..BASE };

fn spec(bits: u32) -> Spec {
    Spec::new(bits, 5 << bits).with(data([0, 3], 0x21)).with([(1, State::Zero), (2, State::Deflated(3))])
}

fn format(name: &str) -> (u32, Vec<u8>) {
    (BACKING_FORMAT, name.as_bytes().to_vec())
}

/// A table of `count` features: 48 bytes each.
fn features(count: u8) -> (u32, Vec<u8>) {
    (FEATURE_NAMES, (0..count).flat_map(|bit| [&[0, bit][..], &[b'f'; 46]].concat()).collect())
}

/// Go through both parents, none, and the first again: all of it is done, and nothing else of the header is changed.
fn all_is_done(image: &[u8]) {
    let others = |image: &[u8]| -> Vec<(u32, Vec<u8>)> {
        let others = extensions(image).into_iter().filter(|(kind, ..)| *kind != BACKING_FORMAT);
        others.map(|(kind, _, data)| (kind, data)).collect()
    };
    let (report, changed) = verify_parents(&Kit, image, &[BASE, PLAIN, Parent { format: "vmdk", ..PLAIN }], CRASHES);
    assert!(report.changed == 5 && report.refused == 0 && report.states > 9, "{report:?}");
    assert_eq!(Kit.recorded(&changed), Some(Kit.expected(&BASE)));
    assert_eq!(others(&changed), others(image), "the other extensions");
    assert_eq!(changed[20..72], image[20..72], "the other fields");
    assert_eq!(changed.len(), image.len());
    // Nothing of the names of before is left.
    let cluster = &changed[..1 << u32::from_be_bytes(image[20..24].try_into().unwrap())];
    assert!(!cluster.windows(4).any(|bytes| bytes == b"much" || bytes == b"orig"));
}

#[test]
fn as_qemu_makes_images() {
    for bits in [9, 12, 16] {
        let image = build(&spec(bits));
        all_is_done(&image);
        for name in [&b"original"[..], &b"o"[..], b"base.qcow2"] {
            all_is_done(&with_header(image.clone(), &[format("raw")], 8, name));
        }
    }
    // The eight features of QEMU 10: the table ends in the second sector, and the name follows it.
    all_is_done(&with_header(build(&spec(12)), &[format("raw"), features(8)], 8, b"original"));
}

#[test]
fn names_in_places_of_every_kind() {
    let image = || build(&spec(12));
    for room in [0, 8, 16, 24, 100, 460, 1000, 3000] {
        all_is_done(&with_header(image(), &[format("qcow2")], room, b"original"));
        // None of before has a format, and the table that follows the header reaches the end of the first sector.
        all_is_done(&with_header(image(), &[features(7)], room, b"original"));
        all_is_done(&with_header(image(), &[features(8)], room, b"original"));
        all_is_done(&with_header(image(), &[], room, b"original"));
    }
    // The second sector begins with the name, and there is no end marker before it.
    let tight = with_header(image(), &[features(8), (UNKNOWN, vec![5; 8])], 0, b"original");
    let error = verify_parent(&Kit, &tight, Some(&BASE), CRASHES).unwrap_err();
    assert!(error.text.contains("`qemu-img rebase`, without -u"), "{error}");
    all_is_done(&with_header(
        image(),
        &[(UNKNOWN, vec![9; 13]), format("qcow2"), (UNKNOWN + 1, vec![8; 3])],
        8,
        b"orig",
    ));
}

#[test]
fn version_2_snapshots_bitmaps_and_a_dirty_image() {
    all_is_done(&build(&spec(9).version(2)));
    all_is_done(&with_header(build(&spec(12).version(2)), &[format("qcow2")], 8, b"original"));
    let shared = Spec { snapshots: 2, ..spec(12) };
    all_is_done(&build(&shared));
    let mut dirty = build(&shared);
    dirty[79] |= 1;
    all_is_done(&dirty);
}

#[test]
fn bitmaps_are_kept_and_unknown_autoclear_features_cleared() {
    let marked = BitmapSpec::new(0, 12, &[Bits::All]);
    let spec = Spec { bitmaps: vec![marked], autoclear: 1, ..spec(12) };
    let image = build(&spec);
    let mut unknown = image.clone();
    unknown[88] = 0x80;
    for image in [image, unknown] {
        let (_, changed) = verify_parent(&Kit, &image, Some(&BASE), CRASHES).unwrap();
        assert_eq!(changed[88..96], [0, 0, 0, 0, 0, 0, 0, 1]);
        assert!(extension(&changed).is_some());
    }
}

#[test]
fn what_a_header_cannot_name_is_refused() {
    let plain = build(&spec(12));
    // Three names that are too long, an empty one, one with a zero byte; an empty format, and one that is too long.
    assert_eq!(verify_odd_parents(&Kit, &plain, &BASE, CRASHES), 7);

    let refused = |image: &[u8], parent: Option<&Parent<'_>>| {
        let error = verify_parent(&Kit, image, parent, CRASHES).unwrap_err();
        assert_eq!(error.code, ErrorCode::UnsupportedFormat, "{error}");
        error.text
    };
    let longest = Parent { name: &[b'n'; 1023], ..BASE };
    assert!(verify_parent(&Kit, &plain, Some(&longest), CRASHES).is_ok());
    let small = build(&spec(9));
    assert!(refused(&small, Some(&longest)).contains("has no room"));
    let fits = Parent { name: &[b'n'; 512 - 104 - 24], ..BASE };
    assert!(verify_parent(&Kit, &small, Some(&fits), CRASHES).is_ok());
    assert!(refused(&small, Some(&Parent { name: &[b'n'; 512 - 104 - 23], ..BASE })).contains("has no room"));
    // Extensions behind the first sector would have to be moved.
    let many = with_header(plain.clone(), &[features(20)], 8, b"original");
    assert!(refused(&many, Some(&BASE)).contains("`qemu-img rebase`, without -u"));
    let long = with_header(plain, &[format("raw"), features(20)], 8, b"original");
    assert!(verify_parent(&Kit, &long, Some(&BASE), CRASHES).is_ok());
    assert!(refused(&long, None).contains("`qemu-img rebase`, without -u"));
    assert!(refused(&long, Some(&Parent { format: "parallels", ..BASE })).contains("`qemu-img rebase`, without -u"));
}

#[test]
fn a_corrupt_image_is_refused() {
    let mut image = build(&spec(12));
    image[79] |= 2;
    let error = verify_parent(&Kit, &image, Some(&BASE), CRASHES).unwrap_err();
    assert_eq!(error.code, ErrorCode::OverlayCorrupt);
}
