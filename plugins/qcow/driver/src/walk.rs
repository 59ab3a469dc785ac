//! Going through all entries of all tables, in the order of the disk. What lies in a hole of the file is not read.

use crate::image::Image;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::table::{Big64, EntryKind, Table};
use instar_guest_sdk::{overflow, BlockIo, DriverResult, Holes};
use instar_qcow_format::ENTRY_BYTES;

/// Bytes of L2 tables that are read at once, if there is room, and at least one table.
const CHUNK: u64 = 1 << 20;
/// L2 tables that are looked at in one go.
const TABLES: usize = 256;

/// Who is shown the entries that are not 0.
pub trait Visitor {
    /// An L1 entry, which stands at byte `at` of the file. Returns the place of its table in the file; `None`: it is left out.
    ///
    /// # Errors
    /// Ends the walk.
    fn table(&mut self, number: u64, at: u64) -> DriverResult<Option<u64>>;

    /// The entry of a guest cluster, which stands at byte `at` of the file.
    ///
    /// # Errors
    /// Ends the walk.
    fn entry(&mut self, cluster: u64, number: u64, at: u64) -> DriverResult<()>;
}

/// Show all entries that are not 0 to `visitor`.
///
/// # Errors
/// Those of the visitor; I/O errors.
pub fn walk(io: &mut dyn BlockIo, image: &Image, visitor: &mut dyn Visitor) -> DriverResult<()> {
    let mut l1 = Table::<Big64>::sparse(image.device, 0);
    let mut holes = Holes::default();
    let room = (CHUNK.min(io.heap_free() as u64 / 16) / image.header.table_bytes()).max(1);
    let room = usize::try_from(room).unwrap_or(1).min(TABLES);
    let mut tables = Vec::with_capacity(room);
    l1.each(io, image.header.l1_offset, image.header.l1_entries(), &mut |io, index, number| {
        if let Some(table) = visitor.table(number, image.l1_place(index))? {
            tables.push((index, table));
        }
        if tables.len() >= room {
            walk_tables(io, image, &mut holes, &mut tables, visitor)?;
        }
        Ok(())
    })?;
    walk_tables(io, image, &mut holes, &mut tables, visitor)
}

/// Show the entries of these tables, each with its index, to `visitor`, and forget the tables.
fn walk_tables(
    io: &mut dyn BlockIo,
    image: &Image,
    holes: &mut Holes,
    tables: &mut Vec<(u64, u64)>,
    visitor: &mut dyn Visitor,
) -> DriverResult<()> {
    let length = image.header.table_bytes();
    let bytes = usize::try_from(length).map_err(|_| overflow("an L2 table"))?;
    let ranges: Vec<_> = tables.iter().map(|&(_, table)| table..table.saturating_add(length)).collect();
    let held = holes.hold_data(io, image.device, &ranges)?;
    let mut held = held.into_iter();
    tables.retain(|_| held.next() != Some(false));
    let mut buffers: Vec<Vec<u8>> = tables.iter().map(|_| vec![0; bytes]).collect();
    let read = |(&(_, table), buffer): (&(u64, u64), &mut Vec<u8>)| {
        Request::read(image.device, table, buffer.as_mut_ptr() as u64, length)
    };
    let mut requests: Vec<Request> = tables.iter().zip(&mut buffers).map(read).collect();
    if !requests.is_empty() {
        io.run(&mut requests)?;
    }
    for ((index, table), buffer) in tables.drain(..).zip(&buffers) {
        let first = index << image.header.l2_bits;
        for (within, entry) in (0..).zip(buffer.chunks_exact(8)) {
            let number = Big64::decode(entry);
            if number != 0 {
                visitor.entry(first + within, number, table + within * ENTRY_BYTES)?;
            }
        }
    }
    Ok(())
}
