//! Another parent: at every instant the locator is the one or the other, through the log.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, missing_docs)]

use instar_guest_sdk::abi::{DeviceRole, ImageId, ParentStage, Phase};
use instar_guest_sdk::conformance::{verify_odd_parents, verify_parent, ParentKit};
use instar_guest_sdk::crash::Crashes;
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{BlockIo, FormatDriver, Parent, Source};
use instar_vhdx_driver::Vhdx;
use instar_vhdx_format::Guid;
use instar_vhdx_testkit::{build, device, Kind, Kit, Linkage, Log, Spec, View, MIB};

const CRASHES: Crashes = Crashes { drawn: 1, seed: 1 };
const SIZE: u64 = 18 * 4096;

fn base() -> Parent<'static> {
    Parent { name: b"../a b/grand.vhdx", format: "vhdx", identity: ImageId::new(&[0x42; 16]), virtual_size: SIZE }
}

fn absolute() -> Parent<'static> {
    Parent { name: b"/srv/disks/other base.vhdx", identity: ImageId::new(&[0x43; 16]), ..base() }
}

fn spec() -> Spec {
    Spec { id: 7, ..Spec::new(Kind::Differencing, SIZE as usize) }.with([(0, 3, 0x21), (30, 20, 0x22), (143, 1, 0x24)])
}

/// All of it is done, and what a guest reads has the identity that it had.
fn is_done(image: &[u8], parent: &Parent<'_>) -> Vec<u8> {
    let (states, changed) = verify_parent(&Kit, image, Some(parent), CRASHES).unwrap();
    assert!(states > 9, "{states}");
    let (before, after) = (View::new(image), View::new(&changed));
    assert!(after.guid(1) == before.guid(1) && after.guid(0) != before.guid(0));
    assert!(after.both && !after.is_dirty() && changed.len() == image.len());
    changed
}

#[test]
fn whatever_stands_in_the_log() {
    for (log, parent) in [(Log::Empty, base()), (Log::Pending, absolute()), (Log::Stale, base())] {
        is_done(&build(&Spec { log, ..spec() }), &parent);
    }
}

#[test]
fn locators_of_all_kinds() {
    is_done(&build(&Spec { linkage: Linkage::Alone, ..spec() }), &absolute());
    is_done(&build(&Spec { linkage: Linkage::Torn, both: false, ..spec() }), &base());
}

#[test]
fn a_long_name_and_a_short_one_again() {
    let long = format!("{}base.vhdx", "directory/".repeat(3000));
    let changed = is_done(&build(&spec()), &Parent { name: long.as_bytes(), ..base() });
    is_done(&changed, &base());
}

/// The image has told that its parent is about to change when it gets another one: until it has that, it keeps what it told.
#[test]
fn what_was_announced_holds_until_then() {
    for linkage in [Linkage::Alone, Linkage::Second] {
        let image = build(&Spec { linkage, ..spec() });
        let config = device(0, &image, image.len() as u64);
        let mut io = MemoryDevices::new([(0, image.clone())]);
        io.hold([(DeviceRole::Overlay { emptied: false, identity: true }, &config)]);
        let mut source = Vhdx::open_source(&mut io, &config).unwrap();
        let next = Guid([4; 16]).next(&[7; 16]);
        io.enter(Phase::Target);
        source.follow_parent(&mut io, &ImageId::new(&next.0).unwrap(), ParentStage::Announced).unwrap();
        let told = io.files[&0].clone();
        let announced = |bytes: &[u8]| {
            let mut io = MemoryDevices::new([(0, bytes.to_vec())]);
            let read = &mut |offset: u64, bytes: &mut [u8]| io.read(0, offset, bytes);
            instar_vhdx_format::Opened::load(bytes.len() as u64, read).unwrap().lineage().unwrap().announced
        };
        assert!(told != image && announced(&told) == Some(next));
        let (states, changed) = verify_parent(&Kit, &told, Some(&base()), CRASHES).unwrap();
        assert!(states > 10 && announced(&changed).is_none());
        // The states of a change, which `recorded` does not tell from each other.
        let config = device(0, &told, told.len() as u64);
        let mut io = MemoryDevices::new([(0, told.clone())]);
        io.hold([(DeviceRole::Child, &config)]);
        let mut source = Vhdx::open_source(&mut io, &config).unwrap();
        source.plan_parent(&mut io, Some(&base())).unwrap();
        io.enter(Phase::Target);
        io.enter(Phase::Children);
        source.set_parent(&mut io).unwrap();
        let old = Kit.recorded(&told);
        CRASHES.each(&[(0, told)].into(), &io.log, &mut |files| {
            let is_old = Kit.recorded(&files[&0]) == old;
            assert_eq!(announced(&files[&0]), is_old.then_some(next), "{linkage:?}");
        });
    }
}

#[test]
fn what_cannot_be_recorded_is_refused() {
    let image = build(&spec());
    assert_eq!(verify_odd_parents(&Kit, &image, &base(), CRASHES), 10, "all but a longer one, and that in Unicode");
    let refused = |image: &[u8], parent: Option<Parent<'_>>, words: &str| {
        let error = verify_parent(&Kit, image, parent.as_ref(), CRASHES).unwrap_err();
        assert!(error.text.contains(words), "{error}");
    };
    refused(&image, None, "cannot be without a parent");
    refused(&image, Some(Parent { format: "vpc", ..base() }), "the new one is a vpc");
    refused(&image, Some(Parent { virtual_size: SIZE + 512, ..base() }), "both have to be equal");
    refused(&image, Some(Parent { name: b"a\\b", ..base() }), "cannot stand");
    refused(&image, Some(Parent { identity: ImageId::new(&[0; 16]), ..base() }), "zero");
    refused(&build(&Spec { kind: Kind::Dynamic, ..spec() }), Some(base()), "has no parent that could be another one");
    refused(&[&image[..], &[0; MIB / 2]].concat(), Some(base()), &format!("`truncate -s {}`", image.len() + MIB));
    let (_, padded) = verify_parent(&Kit, &[&image[..], &[0; MIB - 4096]].concat(), Some(&base()), CRASHES).unwrap();
    assert_eq!(padded.len(), image.len() + MIB);
    let mut damaged = image.clone();
    let table = View::new(&image).table.0;
    damaged[table..table + 8].copy_from_slice(&(2u64 << 20 | 6).to_le_bytes());
    refused(&damaged, Some(base()), "overlaps");
}
