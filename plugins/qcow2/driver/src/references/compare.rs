//! References that were counted, against the refcounts of the image.

use crate::image::Image;
use crate::refcount::blocks::{Refcounts, CLUSTERS_PER_LOAD};
use alloc::format;
use alloc::vec::Vec;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::HostCluster;

/// Refuse a cluster that has more references than its refcount says. `counted` are clusters, ascending, with the number of
/// references to each.
///
/// # Errors
/// Corruption; I/O errors.
pub(crate) fn refuse_too_few(
    io: &mut dyn BlockIo,
    image: &Image,
    refcounts: &mut Refcounts,
    counted: &mut dyn Iterator<Item = (HostCluster, u64)>,
) -> DriverResult<()> {
    loop {
        let batch: Vec<(HostCluster, u64)> = (&mut *counted).take(CLUSTERS_PER_LOAD).collect();
        if batch.is_empty() {
            return Ok(());
        }
        refcounts.table.shrink(CLUSTERS_PER_LOAD);
        refcounts.blocks.shrink(CLUSTERS_PER_LOAD / 16);
        refcounts.load(io, image, batch.iter().map(|&(cluster, _)| cluster))?;
        for (cluster, references) in batch {
            let count = refcounts.get(image, cluster)?;
            if count < references {
                let offset = image.cluster_size().host_offset(cluster).unwrap_or_default();
                let text = if references == 1 {
                    format!("the cluster at offset {offset} is in use but has refcount {count}")
                } else {
                    format!("the cluster at offset {offset} has {references} references but refcount {count}")
                };
                return Err(image.corrupt(offset.0, text));
            }
        }
    }
}
