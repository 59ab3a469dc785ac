//! The source role: runs of sectors that the image holds.

use crate::image::Image;
use crate::lookup::{Held, Lookup};
use crate::mend::Mend;
use crate::open::Opened;
use crate::parent::NewParent;
use core::ops::Range;
use instar_guest_sdk::abi::{CheckSummary, ErrorCode, FindingKind, ImageInfo, Repair, RepairSummary};
use instar_guest_sdk::{overflow, BlockIo, DriverError, DriverResult, Extent, Extents, Parent, Source};
use instar_vhd_format::SECTOR;

/// A VHD that data comes from.
#[derive(Debug)]
pub struct VhdSource {
    body: Opened,
    lookup: Lookup,
    /// What was planned last.
    parent: Option<NewParent>,
    /// What is to be mended, once it was planned.
    mend: Mend,
}

impl VhdSource {
    pub(crate) fn new(body: Opened) -> Self {
        Self { body, lookup: Lookup::default(), parent: None, mend: Mend::default() }
    }
}

/// The runs of sectors of a piece that begins at guest byte `start` and is `length` bytes long, as extents.
fn runs<'a>(image: &'a Image, held: &'a Held, start: u64, length: u64) -> impl Iterator<Item = Extent> + 'a {
    let sectors = usize::try_from(length / SECTOR).unwrap_or(0);
    let mut at = 0;
    core::iter::from_fn(move || {
        let (data, run) = match held {
            Held::Nothing => return None,
            Held::All(data) => (*data, Some(at..sectors).filter(|run| !run.is_empty())),
            Held::Some(data, bitmap) => (*data, bitmap.next_run(at, sectors)),
        };
        let Range { start: from, end } = run?;
        at = end;
        let offset = from as u64 * SECTOR;
        Some(Extent::data(start + offset, (end - from) as u64 * SECTOR, image.device, data + offset))
    })
}

/// See [`Source::extents`]: what an image with blocks holds.
fn extents(
    io: &mut dyn BlockIo,
    image: &Image,
    lookup: &mut Lookup,
    range: &Range<u64>,
    out: &mut Extents,
) -> DriverResult<u64> {
    let bytes = image.piece_bytes();
    let limit = range.end.min(image.size).div_ceil(bytes);
    for piece in range.start / bytes..limit {
        let start = piece.checked_mul(bytes).ok_or_else(|| overflow("a piece"))?;
        let length = bytes.min(image.size - start);
        let held = lookup.piece(io, image, piece, limit)?;
        for extent in runs(image, held, start, length).filter(|extent| extent.end() > range.start) {
            if !out.push(extent) {
                return Ok(extent.guest_offset);
            }
        }
    }
    Ok((limit.saturating_mul(bytes)).min(image.size).max(range.end))
}

impl Source for VhdSource {
    fn info(&self) -> ImageInfo {
        match &self.body {
            Opened::Fixed(fixed) => ImageInfo { virtual_size: fixed.size, cluster_size: 1 },
            Opened::Sparse(image) => ImageInfo { virtual_size: image.size, cluster_size: image.header.block_size() },
        }
    }

    /// A block is held, even if its bitmap says that no sector of it is there.
    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        match &self.body {
            Opened::Fixed(fixed) if will_empty => {
                let text = "a fixed disk cannot be emptied: it has no parent";
                Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(fixed.device, fixed.tail_offset))
            }
            Opened::Fixed(fixed) => Ok(fixed.size / SECTOR),
            Opened::Sparse(image) => Ok(image.verify(io)?.held),
        }
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        match &self.body {
            Opened::Fixed(fixed) => {
                let taken = out.push(Extent::data(0, fixed.size, fixed.device, 0));
                Ok(if taken { fixed.size.max(range.end) } else { range.start })
            }
            Opened::Sparse(image) => extents(io, image, &mut self.lookup, &range, out),
        }
    }

    fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
        Err(overflow("an encoded extent"))
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.lookup.forget();
        match &mut self.body {
            Opened::Fixed(_) => Err(overflow("a fixed disk that is emptied")),
            Opened::Sparse(image) => image.empty(io),
        }
    }

    fn check(
        &mut self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        match &self.body {
            // Opening it has checked all of its metadata.
            Opened::Fixed(_) => Ok(CheckSummary::default()),
            Opened::Sparse(image) => image.check(io, finding),
        }
    }

    fn plan_parent(&mut self, io: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<()> {
        self.parent = match &self.body {
            Opened::Fixed(fixed) => {
                let text = "a fixed disk has no parent that could be another one";
                return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(fixed.device, fixed.tail_offset));
            }
            Opened::Sparse(image) => Some(image.plan_parent(io, parent)?),
        };
        Ok(())
    }

    fn set_parent(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        match (&mut self.body, self.parent.take()) {
            (Opened::Sparse(image), Some(parent)) => image.set_parent(io, &parent),
            _ => Err(overflow("a parent that was not planned")),
        }
    }

    fn plan_repair(
        &mut self,
        io: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<RepairSummary> {
        let Opened::Sparse(image) = &self.body else { return Ok(RepairSummary::default()) };
        let (mend, summary) = image.plan_repair(io, repair, finding)?;
        self.mend = mend;
        Ok(summary)
    }

    fn repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        match &mut self.body {
            Opened::Fixed(_) => Err(overflow("a fixed disk that is repaired")),
            Opened::Sparse(image) => image.repair(io, core::mem::take(&mut self.mend)),
        }
    }
}
