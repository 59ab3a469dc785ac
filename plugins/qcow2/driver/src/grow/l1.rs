//! An L1 table that is too short for a larger disk: step 2 of [`grow`](crate::grow).

use crate::image::overflow;
use crate::metadata::cluster_run::ClusterRun;
use crate::write::backing::Backing;
use alloc::vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::L1_SIZE_FIELD;

/// What becomes of the L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum L1Growth {
    /// It is long enough.
    Stays,
    /// It gets this many entries where it is.
    InPlace(u32),
    /// It moves, and gets this many entries.
    Moves(u32),
}

impl L1Growth {
    /// How the L1 table grows, and how many new clusters that takes.
    ///
    /// # Errors
    /// Corruption; I/O errors.
    pub(crate) fn plan(io: &mut dyn BlockIo, backing: &mut Backing, size: u64) -> DriverResult<(Self, u64)> {
        let cluster_size = backing.image.cluster_size();
        let header = &backing.image.header;
        let entries = size.div_ceil(header.l2_coverage());
        let wanted = u32::try_from(entries).map_err(|_| overflow("the length of the L1 table"))?;
        if wanted <= header.l1_entries {
            return Ok((Self::Stays, 0));
        }
        let (clusters, held) = (cluster_size.count_for(entries * 8), cluster_size.count_for(header.l1_bytes()));
        let first = cluster_size.host_cluster(header.l1_table).0;
        if held != 0 && backing.space.refcounts.in_use(io, &backing.image, first..first + held)?.count != held {
            return Err(backing.image.corrupt(L1_SIZE_FIELD, "the L1 table is in use but has refcount 0"));
        }
        if clusters <= held && backing.image.holds_bytes(backing.image.header.l1_table, entries * 8) {
            return Ok((Self::InPlace(wanted), 0));
        }
        Ok((Self::Moves(wanted), clusters))
    }

    /// Have the table as long as that. Durable when it returns, but for the release of the old table's clusters.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn run(self, io: &mut dyn BlockIo, backing: &mut Backing) -> DriverResult<()> {
        match self {
            Self::Stays => Ok(()),
            Self::InPlace(entries) => lengthen(io, backing, entries),
            Self::Moves(entries) => relocate(io, backing, entries),
        }
    }
}

/// The first way: the table's own clusters have room.
fn lengthen(io: &mut dyn BlockIo, backing: &mut Backing, entries: u32) -> DriverResult<()> {
    let device = backing.image.device;
    let end = backing.image.header.l1_table.0 + backing.image.header.l1_bytes();
    let length = u64::from(entries - backing.image.header.l1_entries) * 8;
    let mut behind = vec![0; usize::try_from(length).map_err(|_| overflow("the length of the L1 table"))?];
    io.read(device, end, &mut behind)?;
    if behind.iter().any(|&byte| byte != 0) {
        behind.fill(0);
        backing.out.write(io, end, &behind)?;
    }
    backing.flush(io)?;
    backing.write_field(io, L1_SIZE_FIELD, &entries.to_be_bytes())?;
    backing.image.header.l1_entries = entries;
    backing.mapping.l1.clear();
    Ok(())
}

/// The second way: a new table.
fn relocate(io: &mut dyn BlockIo, backing: &mut Backing, entries: u32) -> DriverResult<()> {
    let size = backing.image.cluster_size();
    let (old, old_bytes) = (backing.image.header.l1_table, backing.image.header.l1_bytes());
    let count = size.count_for(u64::from(entries) * 8);
    let first = backing.reserve_run(io, count)?;
    let new = backing.image.host_offset(first)?;
    if old_bytes != 0 {
        backing.out.copy(io, old.0, new.0, old_bytes)?;
    }
    backing.publish(io)?;
    let mut field = [0; 12];
    field[..4].copy_from_slice(&entries.to_be_bytes());
    field[4..].copy_from_slice(&new.0.to_be_bytes());
    backing.space.referenced();
    backing.write_field(io, L1_SIZE_FIELD, &field)?;
    (backing.image.header.l1_table, backing.image.header.l1_entries) = (new, entries);
    backing.mapping.l1.clear();
    backing.release(io, ClusterRun::of(size, old, old_bytes).clusters().collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
mod tests {
    use super::*;
    use crate::testing::open;
    use instar_guest_sdk::abi::DEVICE_OUTPUT;
    use instar_guest_sdk::memory::{Change, MemoryDevices};
    use instar_qcow2_testkit::builder::{Spec, State};

    /// 60 entries: a cluster of 512 bytes has room for 4 more.
    fn parts() -> (MemoryDevices, Backing) {
        let (io, image) = open(&Spec::new(9, 60 * (64 << 9)).with([(3, State::Data(1))]));
        (io, Backing::new(image, false))
    }

    #[test]
    fn a_table_moves_only_where_it_has_to() {
        let (mut io, mut backing) = parts();
        for (entries, expected) in [(60, L1Growth::Stays), (64, L1Growth::InPlace(64)), (65, L1Growth::Moves(65))] {
            let clusters = if entries == 65 { 2 } else { 0 };
            let planned = L1Growth::plan(&mut io, &mut backing, entries * (64 << 9)).unwrap();
            assert_eq!(planned, (expected, clusters));
        }
        assert!(io.log.is_empty());
    }

    #[test]
    fn the_header_refers_to_a_table_that_is_durable() {
        for (growth, entries) in [(L1Growth::InPlace(64), 64), (L1Growth::Moves(65), 65)] {
            let (mut io, mut backing) = parts();
            let header = &backing.image.header;
            let (old, old_bytes) = (header.l1_table.0 as usize, header.l1_bytes() as usize);
            let before = io.files[&DEVICE_OUTPUT].clone();
            growth.run(&mut io, &mut backing).unwrap();
            let header = &backing.image.header;
            let now = &io.files[&DEVICE_OUTPUT];
            assert_eq!(header.l1_entries, entries);
            assert_eq!(now[36..40], entries.to_be_bytes());
            assert_eq!(now[40..48], header.l1_table.0.to_be_bytes());
            let new = header.l1_table.0 as usize;
            assert_eq!(now[new..new + old_bytes], before[old..old + old_bytes]);
            assert!(now[new + old_bytes..new + header.l1_bytes() as usize].iter().all(|&byte| byte == 0));
            // Nothing is unflushed when the header changes, and it is flushed by itself.
            let field = |change: &Change| matches!(change, Change::Write { offset: L1_SIZE_FIELD, .. });
            let at = io.log.iter().position(field).unwrap();
            let flush = |change: Option<&Change>| matches!(change, None | Some(Change::Flush { .. }));
            assert!(flush(at.checked_sub(1).and_then(|before| io.log.get(before))) && flush(io.log.get(at + 1)));
        }
    }
}
