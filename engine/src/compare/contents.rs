//! The two sides of a comparison: the location, allocation and content of their bytes.

use crate::devices::Devices;
use crate::image::ChainImage;
use crate::lookup::Identity;
use crate::map::{cut_at_holes, is_plausible, HoleMeaning, Place};
use instar_guest_abi::ExtentKind;
use instar_guest_protocol::compare::Side;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

/// The location of plain bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// The device.
    pub device: u32,
    /// Byte offset on it.
    pub offset: u64,
}

/// The allocation state of bytes, in the terms of `qemu-img map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
}

/// A part of a side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it ends, in bytes from the beginning of the side.
    pub end: u64,
    /// Its allocation state.
    pub allocation: Allocation,
    /// The location of its bytes; `None` if they are zeroes, or encoded.
    pub location: Option<Location>,
}

/// The files of both views.
#[derive(Debug, Default)]
pub struct Contents {
    places: BTreeMap<u32, Place>,
    /// Which file each device is: both views may have the same one below them.
    identities: BTreeMap<u32, Identity>,
    /// The first slot of each view, and how many layers it has.
    views: [(u32, u32); 2],
}

impl Contents {
    /// Describe the images of both views; `counts` has the number of images in each, and `places` their files.
    pub fn new(places: BTreeMap<u32, Place>, images: &[&ChainImage<'_>], counts: [usize; 2]) -> Self {
        let own = images.iter().map(|image| image.opened.identity);
        let others = images.iter().flat_map(|image| image.files.iter().map(|file| file.opened.identity));
        // The order of the devices: each image's own file, and then the other files of all.
        let identities = places.keys().copied().zip(own.chain(others)).collect();
        Self { identities, ..Self::at(places, counts) }
    }

    /// The same of files of which nothing is known but their places.
    pub(crate) fn at(places: BTreeMap<u32, Place>, counts: [usize; 2]) -> Self {
        let [first, second] = counts.map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        Self { places, identities: BTreeMap::new(), views: [(0, first), (first, second)] }
    }

    /// Whether a run of this length in the view with this index is a valid answer of the guest.
    pub fn is_plausible(&self, view: usize, side: &Side, length: u64) -> bool {
        let (first, count) = self.views[view];
        let slot = first.saturating_add(side.depth);
        side.depth < count && is_plausible(&self.places, slot, side.kind, (side.device, side.offset), length)
    }

    /// Whether two locations are the same place of the same file.
    pub fn are_same(&self, one: Location, two: Location) -> bool {
        let identity = |location: Location| self.identities.get(&location.device);
        one.offset == two.offset && identity(one).is_some() && identity(one) == identity(two)
    }

    /// Iterate over the parts of a side, in order.
    pub fn parts<'d>(&self, devices: &'d Devices, side: &Side, length: u64) -> Box<dyn Iterator<Item = Extent> + 'd> {
        let kind = ExtentKind::from_u32(side.kind);
        let (present, compressed) = (kind.is_some(), kind == Some(ExtentKind::Encoded));
        let zero = matches!(kind, None | Some(ExtentKind::Zero));
        let whole = Allocation { present, zero, data: !zero, compressed };
        if kind != Some(ExtentKind::Data) {
            return Box::new(std::iter::once(Extent { end: length, allocation: whole, location: None }));
        }
        let Side { device, offset, .. } = *side;
        let holes = self.places.get(&device).map_or(HoleMeaning::Ignored, |place| place.holes);
        let part = move |(range, zero): (Range<u64>, bool)| Extent {
            end: range.end - offset,
            allocation: Allocation { zero, data: !zero || holes != HoleMeaning::Absent, ..whole },
            location: (!zero).then_some(Location { device, offset: range.start }),
        };
        Box::new(cut_at_holes(devices, device, holes, offset..offset.saturating_add(length)).map(part))
    }
}

/// Read bytes of a device; bytes past its end are zeroes.
///
/// # Errors
/// The kernel's.
pub fn read(devices: &Devices, Location { device, offset }: Location, buffer: &mut [u8]) -> io::Result<()> {
    let Some(device) = devices.device(device) else { return Err(io::ErrorKind::NotFound.into()) };
    device.read_padded(offset, buffer)
}
