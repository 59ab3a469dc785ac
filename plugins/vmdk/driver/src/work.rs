//! Extents cut at the borders of grain tables and of grains, and gathered so that the tables fit into memory.

use crate::image::Image;
use crate::tables::tables_at_once;
use alloc::vec::Vec;
use instar_guest_sdk::table::Arrival;
use instar_guest_sdk::{overflow, DriverResult, Extent};
use instar_vmdk_format::Place;

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
pub struct GrainPart {
    /// The entry in the table.
    pub entry: usize,
    /// First guest byte of the grain.
    pub grain: u64,
    /// Bytes of the grain, as far as the disk goes.
    pub length: u64,
    /// The part.
    pub extent: Extent,
    /// Whether these are zeroes, and the whole grain as far as the disk goes.
    pub arrival: Arrival,
}

/// Extents that are cut, and gathered in groups of as many tables as are held at once: one group at a time, since one
/// extent of zeroes may be as long as the disk.
#[derive(Debug)]
pub struct Groups<'a> {
    extents: core::slice::Iter<'a, Extent>,
    /// What is left of the extent that was taken last.
    rest: Option<Extent>,
}

impl<'a> Groups<'a> {
    /// Nothing of these extents was taken yet.
    pub fn of(extents: &'a [Extent]) -> Self {
        Self { extents: extents.iter(), rest: None }
    }

    /// The next group; `None` at the end.
    ///
    /// # Errors
    /// `BackingTooSmall` for an extent past the end of the disk.
    pub fn next(&mut self, image: &Image) -> DriverResult<Option<Group>> {
        let mut group = Group::default();
        let (coverage, most) = (image.layout.table_coverage(), tables_at_once(&image.layout));
        loop {
            let Some(rest) = self.rest else {
                let Some(extent) = self.extents.next() else { break };
                extent.end_within(image.layout.virtual_size()).map_err(|error| error.at(image.device, 12))?;
                self.rest = Some(*extent);
                continue;
            };
            let table = image.layout.place(rest.guest_offset).table;
            if group.tables.last() != Some(&table) {
                if group.tables.len() == most {
                    break;
                }
                group.tables.push(table);
            }
            let end = rest.guest_offset.saturating_add(coverage - rest.guest_offset % coverage);
            let piece = rest.clip(0..end).ok_or_else(|| overflow("a grain table"))?;
            self.rest = rest.clip(end..u64::MAX);
            group.pieces.push(Piece { slot: group.tables.len() - 1, extent: piece });
        }
        Ok(Some(group).filter(|group| !group.pieces.is_empty()))
    }
}

/// Cut a piece at the borders of grains: no more parts than a table has entries.
///
/// # Errors
/// An arithmetic guard.
pub fn grains(image: &Image, piece: &Piece) -> DriverResult<Vec<GrainPart>> {
    let mut parts = Vec::new();
    let size = image.layout.grain_bytes();
    for extent in piece.extent.blocks(size)? {
        let Place { entry, grain, .. } = image.layout.place(extent.guest_offset);
        let length = size.min(image.layout.virtual_size().checked_sub(grain).ok_or_else(|| overflow("a grain"))?);
        let arrival = Arrival { zero: extent.is_zero(), whole: extent.length == length };
        parts.push(GrainPart { entry, grain, length, extent, arrival });
    }
    Ok(parts)
}

/// A grain that is gathered until it is whole: its first guest byte, and its bytes.
#[derive(Debug)]
pub struct OpenGrain {
    pub guest: u64,
    pub bytes: Vec<u8>,
}
