//! Extents cut at the borders of grain tables and of grains, and gathered so that the tables fit into memory.

use crate::decide::Arrival;
use crate::disk::split;
use crate::failures::overflow;
use crate::image::Image;
use crate::tables::{place, TABLES_AT_ONCE};
use alloc::vec::Vec;
use instar_guest_sdk::abi::{ErrorCode, Extent, ExtentKind};
use instar_guest_sdk::{DriverError, DriverResult};

/// A part of an extent within one grain table.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Which of the group's tables it falls into.
    pub slot: usize,
    /// The part.
    pub extent: Extent,
}

/// Pieces, ascending, and the tables that they fall into.
#[derive(Debug, Default)]
pub struct Group {
    /// Indices in the grain directory, ascending.
    pub tables: Vec<usize>,
    /// The pieces.
    pub pieces: Vec<Piece>,
}

/// A part of a piece within one grain.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The entry in the table.
    pub entry: usize,
    /// First guest byte of the grain.
    pub grain: u64,
    /// The part.
    pub extent: Extent,
    /// Whether these are zeroes, and the whole grain as far as the disk goes.
    pub arrival: Arrival,
}

/// Extents that are cut, and gathered in groups of so many tables as are held at once: one group at a time, since one extent of
/// zeroes may be as long as the disk.
#[derive(Debug)]
pub struct Groups<'a> {
    extents: core::slice::Iter<'a, Extent>,
    /// What is left of the extent that was taken last.
    rest: Extent,
}

impl<'a> Groups<'a> {
    /// Nothing of these extents was taken yet.
    pub fn of(extents: &'a [Extent]) -> Self {
        Self { extents: extents.iter(), rest: Extent::default() }
    }

    /// The next group; `None` at the end.
    ///
    /// # Errors
    /// [`ErrorCode::BackingTooSmall`] for an extent past the end of the disk.
    pub fn next(&mut self, image: &Image) -> DriverResult<Option<Group>> {
        let mut group = Group::default();
        let coverage = image.header.table_coverage();
        loop {
            if self.rest.length == 0 {
                let Some(extent) = self.extents.next() else { break };
                let end = extent.guest_offset.checked_add(extent.length);
                if end.is_none_or(|end| end > image.header.virtual_size()) {
                    let text =
                        alloc::format!("data at guest offset {} lies past the end of the backing", extent.guest_offset);
                    return Err(DriverError::new(ErrorCode::BackingTooSmall, text).at(image.device, 12));
                }
                self.rest = *extent;
                continue;
            }
            let (table, ..) = place(image, self.rest.guest_offset)?;
            if group.tables.last() != Some(&table) {
                if group.tables.len() == TABLES_AT_ONCE {
                    break;
                }
                group.tables.push(table);
            }
            let (piece, after) = split(self.rest, self.rest.length.min(coverage - self.rest.guest_offset % coverage));
            self.rest = after;
            group.pieces.push(Piece { slot: group.tables.len() - 1, extent: piece });
        }
        Ok(Some(group).filter(|group| !group.pieces.is_empty()))
    }
}

/// Cut a piece at the borders of grains: no more parts than a table has entries.
///
/// # Errors
/// An arithmetic guard.
pub fn grains(image: &Image, piece: &Piece) -> DriverResult<Vec<Part>> {
    let mut parts = Vec::new();
    let size = image.header.grain_bytes();
    let mut rest = piece.extent;
    while rest.length > 0 {
        let (extent, after) = split(rest, rest.length.min(size - rest.guest_offset % size));
        rest = after;
        let (_, entry, grain) = place(image, extent.guest_offset)?;
        let length = size.min(image.header.virtual_size().checked_sub(grain).ok_or_else(|| overflow("a grain"))?);
        let arrival = Arrival { zero: extent.kind == ExtentKind::Zero as u32, whole: extent.length == length };
        parts.push(Part { entry, grain, extent, arrival });
    }
    Ok(parts)
}
