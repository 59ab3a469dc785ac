//! What a source promises of an image that it only looks at.

use super::fixture::{device, ANY_LENGTH, OVERLAY};
use super::kit::ImageKit;
use crate::extents::check_extents;
use crate::memory::MemoryDevices;
use crate::random::Random;
use crate::{BlockIo, Content, Extent, Extents, Source};
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_abi::{DeviceRole, ErrorCode, FindingKind};

/// How many extents are asked for at once: few, so that enumerating stops everywhere, and more than there are.
const ROOMS: [usize; 4] = [1, 2, 7, 1 << 14];
/// Ranges that are drawn.
const RANGES: usize = 24;

/// An image that is only read: any change of it ends the test.
struct Look<'a> {
    kit: &'a dyn ImageKit,
    io: MemoryDevices,
    image: &'a [u8],
}

impl<'a> Look<'a> {
    fn new(kit: &'a dyn ImageKit, image: &'a [u8]) -> Self {
        let mut io = MemoryDevices::new([(OVERLAY, image.to_vec())]);
        io.hold([(DeviceRole::Read, &device(kit, OVERLAY, image, ANY_LENGTH))]);
        Self { kit, io, image }
    }

    fn open(&mut self) -> Box<dyn Source> {
        let opened = self.kit.open_source(&mut self.io, &device(self.kit, OVERLAY, self.image, ANY_LENGTH));
        match opened {
            Ok(source) => source,
            Err(error) => unreachable!("a valid image is not opened: {error}"),
        }
    }
}

/// Verify what a source promises of an image, which is valid.
///
/// # Panics
/// If a promise is broken.
pub(super) fn verify(kit: &dyn ImageKit, image: &[u8], random: &mut Random) {
    let mut look = Look::new(kit, image);
    let info = kit.info(image);
    let size = info.virtual_size;
    let mut source = look.open();
    assert!(source.info().virtual_size == size, "{:?}, the host half says {info:?}", source.info());

    let all = enumerated(&mut look.io, source.as_mut(), 0..size, size, ROOMS[3]);
    for room in ROOMS {
        let found = enumerated(&mut look.io, source.as_mut(), 0..size, size, room);
        assert!(found == all, "{room} extents at once are not the same: {found:?} and {all:?}");
    }
    for _ in 0..RANGES {
        // Operations begin at clusters.
        let start = random.below(size);
        let start = start - start % info.cluster_size.max(1);
        let end = start.saturating_add(1).saturating_add(random.below(size - start)).min(size);
        let part: Vec<Extent> = all.iter().filter_map(|extent| extent.clip(start..end)).collect();
        let found = enumerated(&mut look.io, source.as_mut(), start..end, size, *random.pick(&ROOMS));
        assert!(found == part, "of {start}..{end}: {found:?}, and in the whole: {part:?}");
    }

    let below: Vec<u8> = (0..size).map(|at| (at / 512).to_le_bytes()[0] | 1).collect();
    let seen = content(&mut look.io, source.as_mut(), &all, &below);
    assert!(seen == kit.content(image, Some(&below)), "the extents say something else than the reader of the tests");

    for will_empty in [false, true] {
        // Not every image can be emptied; whether it can is looked at without a change.
        let checked = look.open().verify(&mut look.io, will_empty);
        assert!(will_empty || checked.is_ok(), "a valid image is refused: {checked:?}");
    }
    examine(&mut look);
    assert!(look.io.log.is_empty(), "looking has changed something: {:?}", look.io.log);
}

/// All extents of a range, cut to it, asked for `room` at once.
fn enumerated(io: &mut dyn BlockIo, source: &mut dyn Source, range: Range<u64>, size: u64, room: usize) -> Vec<Extent> {
    let mut all = Extents::with_room_for(usize::MAX);
    let mut from = range.start;
    while from < range.end {
        let mut found = Extents::with_room_for(room);
        let next = match source.extents(io, from..range.end, &mut found) {
            Ok(next) => next,
            Err(error) => unreachable!("extents of a valid image from guest byte {from} on: {error}"),
        };
        let checked = check_extents(&found, from, next, size);
        assert!(checked.is_ok(), "{checked:?}");
        for part in found.iter().filter_map(|extent| extent.clip(range.clone())) {
            assert!(all.push(part));
        }
        from = next;
    }
    all.to_vec()
}

/// What a guest reads over `below`, by the extents. What is encoded is decoded whole, and in two parts.
fn content(io: &mut dyn BlockIo, source: &mut dyn Source, extents: &[Extent], below: &[u8]) -> Vec<u8> {
    let mut disk = below.to_vec();
    for extent in extents {
        let range = usize::try_from(extent.guest_offset).ok().zip(usize::try_from(extent.end()).ok());
        let place = range.and_then(|(start, end)| disk.get_mut(start..end)).unwrap_or_default();
        let read = match extent.content {
            Content::Data { device, offset } => io.read(device, offset, place),
            Content::Zero => {
                place.fill(0);
                Ok(())
            }
            Content::Encoded { .. } | Content::Memory { .. } => {
                let mut whole = vec![0; place.len()];
                let (first, second) = place.split_at_mut(place.len() / 3);
                let middle = extent.guest_offset.saturating_add(first.len() as u64);
                let read = source.read(io, extent, middle, second);
                let read = read.and_then(|()| source.read(io, extent, extent.guest_offset, first));
                let read = read.and_then(|()| source.read(io, extent, extent.guest_offset, &mut whole));
                assert!(read.is_err() || whole == place, "the parts of {extent:?} are not the whole");
                read
            }
        };
        assert!(read.is_ok(), "{extent:?}: {read:?}");
    }
    disk
}

/// Nothing may be lost in a valid image, to a driver that examines images.
fn examine(look: &mut Look<'_>) {
    let mut corruptions = Vec::new();
    let examined = look.open().check(&mut look.io, &mut |kind, text| {
        if kind == FindingKind::Corruption {
            corruptions.push(alloc::string::String::from(text));
        }
    });
    let dirty = look.kit.is_dirty(look.image);
    assert!(dirty || corruptions.is_empty(), "found in a valid image: {corruptions:?}");
    if let Err(error) = examined {
        assert!(error.code == ErrorCode::NotImplemented, "a valid image is not examined: {error}");
    }
}
