//! Disks that grow: content, and every state that a power loss can leave. Those in several files are in `split_grow.rs`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{DeviceConfig, ImageInfo, DEVICE_OUTPUT};
use instar_guest_sdk::conformance::{verify_resize, ImageKit, ANCESTOR};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_guest_sdk::{BlockIo, DriverResult, Sink, Source};
use instar_vmdk_testkit::{build, Kit, Spec, State, View, GRAIN};

/// What one table stands for.
const COVERAGE: usize = 512 * GRAIN;

/// Disks that are larger than those of the other tests.
struct Large;

impl ImageKit for Large {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        Kit.open_source(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        Kit.open_sink(io, device, has_backing)
    }

    fn info(&self, image: &[u8]) -> ImageInfo {
        Kit.info(image)
    }

    fn content(&self, image: &[u8], below: Option<&[u8]>) -> Vec<u8> {
        View::new(image).content(below.unwrap_or_default())
    }

    fn is_sound(&self, image: &[u8]) -> bool {
        View::new(image).assert_consistent();
        true
    }
}

/// Grow the image to `size` bytes, and look at all that is promised; returns the states that were looked at and the image.
fn grows(image: &Spec, ancestor: Option<&Spec>, size: usize) -> (usize, Vec<u8>) {
    let mut files = Files::from([(DEVICE_OUTPUT, build(image))]);
    files.extend(ancestor.map(|ancestor| (ANCESTOR, build(ancestor))));
    let (report, left) = verify_resize(&Large, &files, size as u64, Crashes { drawn: 2, seed: 1 });
    assert_eq!(report.committed, 1, "refused");
    let image = left.unwrap().remove(&DEVICE_OUTPUT).unwrap();
    let view = View::new(&image);
    assert_eq!(view.size, size);
    assert!(view.text().contains(&format!("RW {} SPARSE \"x\"", size / 512)), "{}", view.text());
    assert_eq!(&image[28..44], &[1_u64, 1].map(u64::to_le_bytes).concat()[..], "the descriptor is where QEMU reads it");
    (report.states, image)
}

fn base(size: usize) -> Spec {
    Spec::new(size, 5, u32::MAX).with([(0, State::Data(0x21)), (3, State::Data(0x22)), (11, State::Data(0x23))])
}

#[test]
fn within_the_last_table_and_the_last_grain() {
    let image = base(12 * GRAIN - 512);
    for size in [12 * GRAIN, 13 * GRAIN, 500 * GRAIN] {
        let (states, _) = grows(&image, None, size);
        assert!(states > 5, "{states}");
    }
}

#[test]
fn by_tables_for_which_the_directory_has_room() {
    for redundant in [true, false] {
        let image = Spec { redundant, ..base(12 * GRAIN) };
        let (_, image) = grows(&image, None, 3 * COVERAGE + 512);
        let view = View::new(&image);
        assert_eq!(view.entries.len(), 1 + usize::from(redundant));
        // QEMU writes to no part of a disk that has no table.
        let directory = u64::from_le_bytes(image[56..64].try_into().unwrap()) as usize * 512;
        let tables: Vec<u32> = image[directory..directory + 16]
            .chunks(4)
            .map(|entry| u32::from_le_bytes(entry.try_into().unwrap()))
            .collect();
        assert!(tables.iter().all(|&table| table != 0), "{tables:?}");
    }
}

/// 128 entries fill a sector: the next one needs another place.
#[test]
fn by_more_tables_than_the_directory_has_room_for() {
    let image = base(127 * COVERAGE);
    let before = build(&image);
    let (_, image) = grows(&image, None, 128 * COVERAGE + 512);
    assert_ne!(before[56..64], image[56..64], "the directory has the same place");
    assert_ne!(before[48..56], image[48..56], "the second one has the same place");
}

/// What a longer backing holds past the old end does not come to light: zeroes hide it, without a place or in grains.
#[test]
fn over_a_longer_backing() {
    let below = Spec::new(20 * GRAIN, 4, u32::MAX).with((0..20).map(|grain| (grain, State::Data(0x66))));
    let long = Spec::new(COVERAGE + 4 * GRAIN, 4, u32::MAX).with((508..516).map(|grain| (grain, State::Data(0x66))));
    for zeroed in [true, false] {
        for lazy_tables in [true, false] {
            let top = Spec { zeroed, lazy_tables, ..Spec::new(6 * GRAIN - 512, 7, 4) };
            let own = top.clone().with([(0, State::Data(0x31))]);
            for (top, size) in [(&top, 8 * GRAIN), (&own, 30 * GRAIN), (&own, 2 * COVERAGE)] {
                grows(top, Some(&below), size);
            }
            grows(&own, Some(&long), COVERAGE + 3 * GRAIN);
        }
    }
}

/// What the entries and the last grain say of what lies past the old end was nobody's.
#[test]
fn over_what_lies_past_the_end() {
    for zeroed in [true, false] {
        let longer = Spec { zeroed, ..base(20 * GRAIN) }.with([(12, State::Data(0x61)), (19, State::Data(0x62))]);
        let mut image = build(&longer);
        image[12..20].copy_from_slice(&(12 * GRAIN as u64 / 512 - 1).to_le_bytes());
        let files = Files::from([(DEVICE_OUTPUT, image)]);
        let (report, left) = verify_resize(&Kit, &files, 19 * GRAIN as u64 + 512, Crashes { drawn: 2, seed: 1 });
        let image = &left.unwrap()[&DEVICE_OUTPUT];
        assert!(report.states > 5 && View::new(image).content(&[])[12 * GRAIN - 512..].iter().all(|&byte| byte == 0));
        let (_, left) = verify_resize(&Kit, &left_as(image), 30 * GRAIN as u64, Crashes { drawn: 0, seed: 1 });
        assert!(View::new(&left.unwrap()[&DEVICE_OUTPUT]).content(&[])[12 * GRAIN..].iter().all(|&byte| byte == 0));
    }
}

fn left_as(image: &[u8]) -> Files {
    Files::from([(DEVICE_OUTPUT, image.to_vec())])
}

/// A text of several sectors is changed at the same stroke as the header.
#[test]
fn with_a_descriptor_of_several_sectors() {
    let image = Spec { descriptor: 3, ..base(12 * GRAIN) };
    let mut files = Files::from([(DEVICE_OUTPUT, build(&image))]);
    let (report, left) = verify_resize(&Kit, &files, 1000 * GRAIN as u64, Crashes { drawn: 4, seed: 1 });
    assert!(report.states > 10, "{report:?}");
    files = left.unwrap();
    assert!(View::new(&files[&DEVICE_OUTPUT]).text().contains("RW 2000 SPARSE"));
}

#[test]
fn what_is_written_once_does_not_grow() {
    let compressed = Spec { compressed: true, ..base(12 * GRAIN) };
    let footer = Spec { footer: true, lazy_tables: true, redundant: false, ..base(12 * GRAIN) };
    for image in [compressed, footer] {
        let files = Files::from([(DEVICE_OUTPUT, build(&image))]);
        let (report, left) = verify_resize(&Kit, &files, 20 * GRAIN as u64, Crashes { drawn: 0, seed: 1 });
        assert!(report.refused == 1 && left.is_none());
    }
}
