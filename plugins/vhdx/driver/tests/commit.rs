//! The commit over in-memory images as the product does it: identities, both places where a child announces its parent's, and
//! what is in the log at every instant.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::Options;
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::memory::MemoryDevices;
use instar_testkit::pair::{assert_goes_with_none_but, run, views, Files};
use instar_testkit::{FormatKit, ANCESTOR, MIDDLE, OVERLAY};
use instar_vhdx_format::Guid;
use instar_vhdx_testkit::{build, crashes, guid_text, Kind, Kit, Linkage, Log, Spec, View, MIB};

const SIZE: usize = MIB - 8192;
const KEEP: Options = Options {
    keep_overlay: true,
    dry_run: false,
    resize_backing: false,
    bitmaps: false,
    disabled_bitmaps: false,
    new_target: false,
};
const EMPTY: Options = Options { keep_overlay: false, ..KEEP };

fn top() -> Spec {
    let spec = Spec { id: 7, parent: [5; 16], ..Spec::new(Kind::Differencing, SIZE) };
    spec.with([(0, 3, 0x21), (1040, 20, 0x23)])
}

fn base() -> Spec {
    Spec::new(Kind::Dynamic, SIZE).with([(1, 1, 0x43)])
}

fn files(top: &Spec, base: &Spec) -> Files {
    [(OVERLAY, build(top)), (DEVICE_OUTPUT, build(base))].into()
}

fn value(files: &Files, number: u32, key: &str) -> Option<String> {
    View::new(&files[&number]).value(key)
}

fn data_write(files: &Files, number: u32) -> [u8; 16] {
    View::new(&files[&number]).guid(1)
}

/// The child goes with the parent, by what every program looks at.
fn assert_linked(files: &Files, child: u32) {
    let parent = guid_text(data_write(files, DEVICE_OUTPUT));
    assert_eq!(value(files, child, "parent_linkage").as_deref(), Some(&parent[..]));
    for number in [child, DEVICE_OUTPUT] {
        let view = View::new(&files[&number]);
        assert!(!view.is_dirty() && view.both && view.fault().is_none(), "image {number}");
    }
}

#[test]
fn identities_follow_the_content() {
    for linkage in [Linkage::Second, Linkage::Alone, Linkage::Torn] {
        for log in [Log::Empty, Log::Pending] {
            let before = files(&Spec { linkage, log, ..top() }, &Spec { log, ..base() });
            let mut io = MemoryDevices::new(before.clone());
            run(&Kit, &mut io, EMPTY, u64::MAX).unwrap();
            assert_linked(&io.files, OVERLAY);
            assert_eq!(data_write(&io.files, DEVICE_OUTPUT), Guid([5; 16]).next(&[7; 16]).0);
            // An image that was made on the overlay matches it as before; both files are other ones now.
            assert_eq!(data_write(&io.files, OVERLAY), [7; 16]);
            for number in [OVERLAY, DEVICE_OUTPUT] {
                assert_ne!(View::new(&io.files[&number]).guid(0), View::new(&before[&number]).guid(0));
            }
            let second = value(&io.files, OVERLAY, "parent_linkage2");
            assert_eq!(second.is_some(), linkage != Linkage::Alone);
            assert!(second.is_none_or(|second| {
                second == guid_text([0; 16]) || second == guid_text(data_write(&io.files, DEVICE_OUTPUT))
            }));
            assert_eq!(View::new(&io.files[&OVERLAY]).held(), 0);
            assert_eq!(io.files[&OVERLAY].len(), 4 * MIB, "nothing but metadata is left");
            // Another child of the base as it was is refused from now on.
            assert!(!Kit.goes_with(&build(&Spec { id: 9, ..top() }), &io.files[&DEVICE_OUTPUT]));
        }
    }
}

/// At every instant the engine finds the parent that the child goes with, and no other.
fn every_crash(before: &Files, options: Options) -> usize {
    let want = views(&Kit, before).1;
    let mut io = MemoryDevices::new(before.clone());
    run(&Kit, &mut io, options, u64::MAX).unwrap();
    let child = if before.contains_key(&MIDDLE) { MIDDLE } else { OVERLAY };
    let states = crashes().each(before, &io.log, &mut |files| {
        assert!(views(&Kit, &files).1 == want, "the overlay changed its content");
        assert_goes_with_none_but(&Kit, &files, before, &want);
        // Nobody who was made on the base as it was takes it for that any more.
        let [was, is] = [before, &files].map(|files| data_write(files, DEVICE_OUTPUT));
        assert!(
            is != was || views(&Kit, &files).0 == views(&Kit, before).0,
            "other content, and the same DataWriteGuid"
        );
        let mut io = MemoryDevices::new(files);
        run(&Kit, &mut io, options, u64::MAX).unwrap();
        assert!(views(&Kit, &io.files) == (want.clone(), want.clone()));
        if options.keep_overlay {
            assert!(Kit.goes_with(&io.files[&child], &io.files[&DEVICE_OUTPUT]));
        } else {
            assert_linked(&io.files, child);
        }
    });
    println!("crash states: {states}");
    states
}

#[test]
fn every_crash_leaves_a_child_that_goes_with_its_parent() {
    for linkage in [Linkage::Second, Linkage::Alone] {
        assert!(every_crash(&files(&Spec { linkage, ..top() }, &base()), EMPTY) >= 15);
        let nothing = Spec { runs: vec![], ..base() };
        assert!(every_crash(&files(&Spec { linkage, ..top() }, &nothing), EMPTY) > 30);
    }
}

/// Microsoft's own programs accept the child at every instant, where its locator has both keys.
#[test]
fn one_of_both_linkages_is_always_the_parents() {
    let before = files(&top(), &base());
    for options in [EMPTY, KEEP] {
        let mut io = MemoryDevices::new(before.clone());
        run(&Kit, &mut io, options, u64::MAX).unwrap();
        assert_linked(&io.files, OVERLAY);
        crashes().each(&before, &io.log, &mut |files| {
            let linked = |files: &Files| {
                let parent = guid_text(data_write(files, DEVICE_OUTPUT));
                ["parent_linkage", "parent_linkage2"]
                    .iter()
                    .any(|key| value(files, OVERLAY, key).as_ref() == Some(&parent))
            };
            assert!(linked(&files), "neither linkage is the parent's");
            // A second run that a power loss ends as well, at its first steps: what was announced has become true, and
            // another identity is announced.
            let mut again = MemoryDevices::new(files.clone());
            run(&Kit, &mut again, options, u64::MAX).unwrap();
            let first = &again.log[..again.log.len().min(12)];
            crashes().each(&files, first, &mut |twice| {
                assert!(linked(&twice), "neither linkage is the parent's in a second run");
            });
        });
    }
}

#[test]
fn the_lowest_of_several_layers_follows() {
    let middle = Spec { id: 6, parent: [5; 16], ..Spec::new(Kind::Differencing, SIZE) }.with([(1, 40, 0x31)]);
    let mut before = files(&Spec { parent: [6; 16], ..top() }, &base());
    before.insert(MIDDLE, build(&middle));
    assert!(every_crash(&before, KEEP) >= 15);
    let mut io = MemoryDevices::new(before.clone());
    run(&Kit, &mut io, KEEP, u64::MAX).unwrap();
    assert_eq!(io.files[&OVERLAY], before[&OVERLAY], "the overlay keeps all");
    assert_linked(&io.files, MIDDLE);
}

#[test]
fn data_that_is_there_takes_no_log() {
    let whole = base().with([(0, SIZE / 512, 0x50)]);
    let mut io = MemoryDevices::new(files(&top(), &whole));
    let log = io.files[&DEVICE_OUTPUT][MIB..2 * MIB].to_vec();
    run(&Kit, &mut io, KEEP, u64::MAX).unwrap();
    assert!(io.files[&DEVICE_OUTPUT][MIB..2 * MIB] == log, "the log was written");
    assert_eq!(View::new(&io.files[&DEVICE_OUTPUT]).guid(2), [0; 16]);
}

/// Many blocks and bitmaps: several entries of the log, one behind the other and over each other.
#[test]
fn more_than_fits_into_an_entry() {
    let size = 40 * MIB;
    let runs: Vec<_> = (0..size / 512).step_by(700).map(|sector| (sector, 3, 0x21)).collect();
    let top = Spec { size, runs, ..top() };
    for base in [
        Spec { size, kind: Kind::Differencing, garbage: 0x99, ..base() },
        Spec { size, states: vec![(3, 2), (4, 3), (5, 1)], ..base() },
    ] {
        let mut before = files(&top, &base);
        let root = Spec { id: 4, size, ..Spec::new(Kind::Dynamic, size) }.with([(0, size / 512, 0x66)]);
        if base.kind == Kind::Differencing {
            before.insert(ANCESTOR, build(&root));
        }
        let want = views(&Kit, &before).1;
        let mut io = MemoryDevices::new(before);
        run(&Kit, &mut io, EMPTY, u64::MAX).unwrap();
        assert!(views(&Kit, &io.files) == (want.clone(), want));
        assert_linked(&io.files, OVERLAY);
    }
}

/// The bits of a block of 32 MiB fill two pages. Before the block was there, both held something that meant nothing.
#[test]
fn bits_of_pieces_that_nothing_arrives_in_are_set_anew() {
    let (size, block) = (48 * MIB, 32 * MIB);
    let base =
        Spec { size, block, garbage: 0x99, ..Spec::new(Kind::Differencing, size) }.with([(size / 512 - 9, 3, 0x43)]);
    let top = Spec { size, runs: vec![(5, 3, 0x21)], ..top() };
    let mut before = files(&top, &base);
    before
        .insert(ANCESTOR, build(&Spec { id: 4, size, ..Spec::new(Kind::Dynamic, size) }.with([(0, size / 512, 0x66)])));
    let want = views(&Kit, &before).1;
    let mut io = MemoryDevices::new(before);
    run(&Kit, &mut io, EMPTY, u64::MAX).unwrap();
    assert!(views(&Kit, &io.files) == (want.clone(), want));
}
