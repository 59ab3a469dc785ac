//! Another parent: at every instant the image names the one or the other, whichever copy of the footer a program believes.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, clippy::panic, missing_docs)]

use instar_guest_sdk::abi::{device_flags, DeviceConfig, DeviceRole, ImageId, Phase, PARENT_ROOM};
use instar_guest_sdk::conformance::{verify_odd_parents, verify_parent, verify_parents, ParentKit};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{BlockIo, FormatDriver, Parent, Source};
use instar_vhd_driver::Vhd;
use instar_vhd_testkit::{build, device, put32, put64, seal, Kind, Kit, Spec, View};

const CRASHES: Crashes = Crashes { drawn: 2, seed: 1 };
const SIZE: u64 = 9 * 8192 - 1024;

fn base() -> Parent<'static> {
    Parent { name: b"../a b/grand.vhd", format: "vpc", identity: ImageId::new(&[0x42; 16]), virtual_size: SIZE }
}

fn absolute() -> Parent<'static> {
    Parent { name: b"/srv/disks/other base.vhd", identity: ImageId::new(&[0x43; 16]), ..base() }
}

fn spec() -> Spec {
    let spec = Spec { id: 7, ..Spec::new(Kind::Differencing, SIZE as usize, 8192) };
    spec.with([(0, 3, 0x21), (16, 16, 0x22), (140, 2, 0x23)])
}

/// Go through both parents, and the first again: all of it is done, and but for header and locators nothing is another.
fn all_is_done(image: &[u8]) -> Vec<u8> {
    let (report, changed) = verify_parents(&Kit, image, &[base(), absolute()], CRASHES);
    // A differencing disk cannot be without a parent.
    assert!(report.changed == 3 && report.refused == 1 && report.states > 30, "{report:?}");
    assert_eq!(Kit.recorded(&changed), Some(Kit.expected(&base())));
    changed
}

#[test]
fn the_layout_stays_as_it_was() {
    let garbage = Spec { garbage: 0x99, gap: 2, ..spec() };
    for spec in [spec(), garbage, Spec { batmap: true, ..spec() }, Spec { table_last: true, ..spec() }] {
        let image = build(&spec);
        let changed = all_is_done(&image);
        assert_eq!(changed.len(), image.len());
        // Footers, and everything behind the locators.
        assert!(changed[..512] == image[..512] && changed[1536 + 1024..] == image[1536 + 1024..], "{spec:?}");
    }
}

#[test]
fn footers_that_are_missing_are_written_again() {
    for (head, tail) in [(false, true), (true, false)] {
        let changed = all_is_done(&build(&Spec { head, tail, ..spec() }));
        assert!(View::new(&changed).is_whole());
    }
}

/// Names that do not fit where the old ones were stand behind the end, with the header, which moves once more then.
#[test]
fn longer_names_take_new_places() {
    let image = build(&spec());
    let long = format!("{}base.vhd", "directory/".repeat(40));
    let parent = Parent { name: long.as_bytes(), ..base() };
    let (states, changed) = verify_parent(&Kit, &image, Some(&parent), CRASHES).unwrap();
    assert!(states > 7 && changed.len() > image.len() && changed.len() < image.len() + PARENT_ROOM as usize);
    let changed = all_is_done(&changed);
    let (_, again) = verify_parent(&Kit, &changed, Some(&absolute()), CRASHES).unwrap();
    assert_eq!(again.len(), changed.len());
}

/// blktap reads the footer at the end first, and the copy in front only where there is none.
#[test]
fn whichever_footer_counts_names_one_parent_whole() {
    let long = format!("{}base.vhd", "directory/".repeat(40));
    for name in [base().name, long.as_bytes()] {
        let parent = Parent { name, ..base() };
        let image = build(&spec());
        let config = device(0, &image, image.len() as u64 + PARENT_ROOM);
        let mut io = MemoryDevices::new([(0, image.clone())]);
        io.hold([(DeviceRole::Child, &config)]);
        let mut source = Vhd::open_source(&mut io, &config).unwrap();
        source.plan_parent(&mut io, Some(&parent)).unwrap();
        io.enter(Phase::Target);
        io.enter(Phase::Children);
        source.set_parent(&mut io).unwrap();
        let told = |bytes: &[u8]| (View::new(bytes).parent().unwrap(), View::by_tail(bytes).parent().unwrap());
        let (old, _) = told(&image);
        let (new, _) = told(&io.files[&0]);
        assert!(old.0 == [4; 16] && new.0 == [0x42; 16]);
        let (mut seen, mut apart) = ([0; 2], 0);
        let below = vec![0x77; SIZE as usize];
        let states = CRASHES.each(&Files::from([(0, image.clone())]), &io.log, &mut |files| {
            let (by_head, by_tail) = told(&files[&0]);
            for parent in [&by_head, &by_tail] {
                let which = [&old, &new].into_iter().position(|one| one == parent);
                seen[which.unwrap_or_else(|| panic!("{parent:?}"))] += 1;
            }
            apart += usize::from(by_head != by_tail);
            assert!(by_head == old || by_tail == new, "what a second run takes for done, is done for all");
            assert!(View::by_tail(&files[&0]).content(&below) == View::new(&image).content(&below));
        });
        assert!(states > 10 && seen.iter().all(|&count| count > 1) && apart > 0, "{states} {seen:?} {apart}");
    }
}

#[test]
fn a_device_that_keeps_its_length_needs_room_behind_the_last_block() {
    let image = build(&spec());
    let end = image.len() - 512;
    for (room, done) in [(0, false), (1024, false), (1536, true), (65536, true)] {
        let mut bytes = image[..end].to_vec();
        bytes.resize(end + room, 0);
        bytes.extend_from_slice(&image[end..]);
        let config = DeviceConfig { flags: device_flags::FIXED_LENGTH, ..device(0, &bytes, bytes.len() as u64) };
        let mut io = MemoryDevices::new([(0, bytes.clone())]);
        io.hold([(DeviceRole::Child, &config)]);
        let mut source = Vhd::open_source(&mut io, &config).unwrap();
        let planned = source.plan_parent(&mut io, Some(&base()));
        assert_eq!(planned.is_ok(), done, "{room}: {planned:?}");
        if done {
            io.enter(Phase::Target);
            io.enter(Phase::Children);
            source.set_parent(&mut io).unwrap();
            let changed = &io.files[&0];
            assert!(changed.len() == bytes.len() && View::new(changed).is_whole());
            assert_eq!(Kit.recorded(changed), Some(Kit.expected(&base())));
        }
    }
}

/// The last block has a place that reaches past the end of the file, and nothing is put there.
#[test]
fn a_block_that_is_cut_keeps_its_place() {
    let spec = Spec { runs: vec![(140, 2, 0x23)], ..spec() };
    for tail in [true, false] {
        let mut image = build(&Spec { tail: false, ..spec.clone() });
        image.truncate(image.len() - 1024);
        if tail {
            let footer = image[..512].to_vec();
            image.extend(footer);
        }
        let changed = all_is_done(&image);
        assert_eq!(changed.len(), image.len() + if tail { 0 } else { 512 });
        let long = format!("{}base.vhd", "directory/".repeat(40));
        verify_parent(&Kit, &image, Some(&Parent { name: long.as_bytes(), ..base() }), CRASHES).unwrap();
    }
}

#[test]
fn xenserver_gets_its_name_and_others_do_not() {
    let codes = |image: &[u8]| -> Vec<[u8; 4]> {
        let all = (0..8).map(|index| image[512 + 576 + index * 24..][..4].try_into().unwrap());
        all.filter(|code| *code != [0; 4]).collect()
    };
    let relink = |image: &[u8], parent| verify_parent(&Kit, image, Some(&parent), CRASHES).unwrap().1;
    assert_eq!(codes(&relink(&build(&spec()), base())), [*b"W2ru"]);
    assert_eq!(codes(&relink(&build(&spec()), absolute())), [*b"W2ku"]);
    let xen = build(&Spec { batmap: true, ..spec() });
    assert_eq!(codes(&relink(&xen, base())), [*b"W2ru", *b"MacX"]);
    assert_eq!(codes(&relink(&xen, absolute())), [*b"W2ku", *b"MacX"]);
}

#[test]
fn what_cannot_be_recorded_is_refused() {
    let image = build(&spec());
    let refused = verify_odd_parents(&Kit, &image, &base(), CRASHES);
    assert_eq!(refused, 11, "all but that in Unicode");
    let refused = |image: &[u8], parent: Option<Parent<'_>>, words: &str| {
        let error = verify_parent(&Kit, image, parent.as_ref(), CRASHES).unwrap_err();
        assert!(error.text.contains(words), "{error}");
    };
    refused(&image, None, "cannot be without a parent");
    refused(&image, Some(Parent { format: "qcow2", identity: None, ..base() }), "the new one is a qcow2");
    refused(&image, Some(Parent { virtual_size: SIZE + 512, ..base() }), "both have to be equal");
    refused(&image, Some(Parent { name: b"a\\b", ..base() }), "cannot stand");
    for kind in [Kind::Dynamic, Kind::Fixed] {
        refused(&build(&Spec { kind, ..spec() }), Some(base()), "has no parent that could be another one");
    }
    let mut damaged = image.clone();
    put64(&mut damaged, 512 + 576 + 16, 1537);
    seal(&mut damaged, 512, 1024, 36);
    refused(&damaged, Some(base()), "overlaps");
    let mut damaged = image;
    put32(&mut damaged, View::new(&build(&spec())).table.0, 2);
    refused(&damaged, Some(base()), "overlaps");
}
