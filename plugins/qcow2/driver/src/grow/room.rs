//! Room for tables that take several clusters: they follow each other.

use crate::image::overflow;
use crate::write::backing::Backing;
use crate::write::lost_data::refuse_lost_data;
use crate::write::summary::over_bound;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::HostCluster;

/// Let the allocator go on where `count` clusters follow each other that are free, with room for the refcount blocks that
/// describe them, all within the reach of the refcount table or all past it. Clusters past the end of the file that have a
/// refcount are leaks. Returns how many clusters that may take, blocks included. What a device has before that is found by
/// [`free_clusters`](crate::refcount::free_clusters).
///
/// # Errors
/// Corruption: data was lost, or what is past the end of the file has refcounts; I/O errors.
pub(crate) fn find_room(io: &mut dyn BlockIo, backing: &mut Backing, count: u64) -> DriverResult<u64> {
    let per_block = backing.space.refcounts.per_block();
    let span = count + count / (per_block - 1).max(1) + 2;
    let reach = backing.space.refcounts.table_entries.saturating_mul(per_block);
    let mut looked_for_lost = backing.image.fixed_length;
    loop {
        let first = backing.space.allocator.next().0;
        let end = first.checked_add(span).ok_or_else(|| overflow("the length of the file"))?;
        let bytes = end.saturating_mul(backing.image.cluster_size().bytes());
        let in_use = backing.space.refcounts.in_use(io, &backing.image, first..end)?;
        if in_use.count > 0 && !looked_for_lost {
            refuse_lost_data(io, &backing.image)?;
            looked_for_lost = true;
        }
        let too_long = bytes > backing.image.max_length;
        if too_long && !backing.image.fixed_length {
            return Err(over_bound(&backing.image, in_use.count, bytes));
        }
        match in_use.last {
            // How much a device lacks is known once everything was counted.
            None if too_long => return Ok(span),
            Some(last) => backing.space.allocator.skip_to(HostCluster(last.0 + 1)),
            None if first >= reach || end <= reach => return Ok(span),
            None => backing.space.allocator.skip_to(HostCluster(reach)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::open;
    use instar_qcow2_testkit::builder::{Spec, State};

    #[test]
    fn what_has_a_refcount_past_the_end_of_the_file_is_lost_or_leaked() {
        // Blocks stand before the data, clusters 20 to 29, of which the file has the first two.
        let data = (0..10).map(|cluster| (cluster, State::Data(1)));
        let (mut io, mut image) = open(&Spec { blocks_first: true, ..Spec::new(9, 100 << 9) }.with(data));
        image.file_length = 22 << 9;
        let error = find_room(&mut io, &mut Backing::new(image.clone(), false), 3).unwrap_err();
        assert!(error.text.starts_with("the file is cut off"), "{}", error.text);
        // Nothing refers to them: a crash has left them.
        image.header.l1_entries = 0;
        let mut backing = Backing::new(image, false);
        let span = find_room(&mut io, &mut backing, 3).unwrap();
        assert_eq!((span, backing.space.allocator.next()), (5, HostCluster(30)));
    }
}
