//! The internal snapshots of an image: which tables they hold.

use crate::image::{overflow, Image};
use crate::metadata::reference::{Reference, Structure};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::{Snapshot, MAX_L1_BYTES};

/// Most bytes of a snapshot table that are taken: 1,000 snapshots with long names take a tenth of it.
const MAX_TABLE: u64 = 4 << 20;
/// Bytes that are read at first: enough for most tables.
const FIRST_READ: u64 = 16 << 10;

/// The snapshots of an image, and the length of their table in bytes.
#[derive(Debug, Default)]
pub struct SnapshotTable {
    /// The snapshots, in the order of the table.
    pub entries: Vec<Snapshot>,
    /// Byte offset in the file of each of its entries.
    places: Vec<u64>,
    /// Bytes of the snapshot table.
    pub table_bytes: u64,
}

impl SnapshotTable {
    /// Read the snapshot table; nothing is read from an image without snapshots.
    ///
    /// # Errors
    /// Corruption: a table, or an L1 table of a snapshot, that lies outside the file or makes no sense;
    /// [`ErrorCode::ScratchTooSmall`] for a table that is too long; I/O errors.
    pub fn read(io: &mut dyn BlockIo, image: &Image) -> DriverResult<Self> {
        let (count, base) = (image.header.snapshots, image.header.snapshot_table);
        if count == 0 {
            return Ok(Self::default());
        }
        let available = image.file_length.saturating_sub(base.0);
        let mut length = FIRST_READ.min(available);
        loop {
            let mut bytes = vec![0; usize::try_from(length).map_err(|_| overflow("the snapshot table"))?];
            io.read(image.device, base.0, &mut bytes)?;
            if let Some(snapshots) = parse_all(image, &bytes, count)? {
                return Ok(snapshots);
            }
            if length == available {
                return Err(image.corrupt(base.0, "the snapshot table lies past the end of the file"));
            }
            if length >= MAX_TABLE {
                return Err(DriverError::new(ErrorCode::ScratchTooSmall, "the image has too many snapshots"));
            }
            length = (length * 8).min(available).min(MAX_TABLE);
        }
    }
}

/// The disk of an internal snapshot as an image: the `number`-th, from 1 on, whose disk has `virtual_size` bytes as the
/// host half saw it.
///
/// # Errors
/// [`ErrorCode::HeaderMismatch`] if there is no such snapshot, or one of another size; as [`SnapshotTable::read`].
pub fn snapshot_view(io: &mut dyn BlockIo, image: &Image, number: u32, virtual_size: u64) -> DriverResult<Image> {
    let all = SnapshotTable::read(io, image)?;
    let index = usize::try_from(number).ok().and_then(|number| number.checked_sub(1));
    let size = |snapshot: &&Snapshot| snapshot.virtual_size.unwrap_or(image.header.virtual_size) == virtual_size;
    let Some(snapshot) = index.and_then(|index| all.entries.get(index)).filter(size) else {
        let text = format!("the snapshot table changed: it has no snapshot {number} of a disk of {virtual_size} bytes");
        return Err(DriverError::new(ErrorCode::HeaderMismatch, text).at(image.device, image.header.snapshot_table.0));
    };
    let mut view = image.mapped_by(snapshot.l1_table, snapshot.l1_entries);
    view.header.virtual_size = virtual_size;
    // Seen from here there are none: the table of this one is not found a second time when the view is verified.
    view.header.snapshots = 0;
    Ok(view)
}

impl SnapshotTable {
    /// The table itself, if there is one, and the L1 tables of the snapshots; empty ones are left out.
    pub(crate) fn structures<'a>(&'a self, image: &'a Image) -> impl Iterator<Item = Reference> + 'a {
        let table = image.header.snapshot_table;
        let table = Reference::one(image, Structure::SnapshotTable, table, self.table_bytes, 64);
        let tables = self.entries.iter().zip(&self.places).enumerate().map(|(number, (snapshot, &at))| {
            let bytes = u64::from(snapshot.l1_entries) * 8;
            Reference::one(image, Structure::InactiveL1(number), snapshot.l1_table, bytes, at)
        });
        core::iter::once(table).chain(tables).filter(|reference| reference.run.count != 0)
    }
}

/// All entries, or `None` if the bytes end before them.
fn parse_all(image: &Image, bytes: &[u8], count: u32) -> DriverResult<Option<SnapshotTable>> {
    let base = image.header.snapshot_table.0;
    let mut snapshots = SnapshotTable::default();
    let mut at = 0;
    for _ in 0..count {
        let parsed = Snapshot::parse(bytes, at, base).map_err(|error| image.corrupt(error.offset, error.text))?;
        let Some((entry, next)) = parsed else { return Ok(None) };
        let l1_bytes = u64::from(entry.l1_entries) * 8;
        let aligned = image.cluster_size().offset_in(entry.l1_table.0) == 0;
        if !aligned || l1_bytes > MAX_L1_BYTES || !image.holds_bytes(entry.l1_table, l1_bytes) {
            let text = format!("the L1 table of snapshot {} lies outside the file", snapshots.entries.len() + 1);
            return Err(image.corrupt(base + at as u64, text));
        }
        snapshots.entries.push(entry);
        snapshots.places.push(base + at as u64);
        at = next;
    }
    snapshots.table_bytes = at as u64;
    Ok(Some(snapshots))
}
