//! Backings that were cut off: what was lost must not be taken for free.

use crate::image::Image;
use crate::metadata::map::MetadataMap;
use crate::metadata::mapped_clusters::MappedClusters;
use crate::write::backing::Backing;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::HostOffset;

/// Whether the file ends within a cluster that is in use and no metadata (which may well be cut short).
///
/// # Errors
/// Corruption of the refcount table; I/O errors.
pub(crate) fn last_cluster_is_cut_data(
    io: &mut dyn BlockIo,
    backing: &mut Backing,
    metadata: &MetadataMap,
) -> DriverResult<bool> {
    let size = backing.image.cluster_size();
    if size.offset_in(backing.image.file_length) == 0 {
        return Ok(false);
    }
    let last = size.host_cluster(HostOffset(backing.image.file_length));
    let metadata = metadata.contains(last);
    Ok(!metadata && backing.space.refcounts.in_use(io, &backing.image, last.0..last.0 + 1)?.count != 0)
}

/// The file looks cut off, and is about to grow over what was lost, which would then read as zeroes, for ever and
/// unnoticed. Only a walk of all L2 tables tells data that was lost from clusters that a crash leaked.
///
/// # Errors
/// Corruption: data was lost; I/O errors.
pub(crate) fn refuse_lost_data(io: &mut dyn BlockIo, image: &Image) -> DriverResult<()> {
    if image.data.is_some() {
        return Ok(());
    }
    MappedClusters::new(image).walk(io, image, 0, &mut |mapped| {
        mapped.cut_off(image).map_or(Ok(true), |text| Err(image.corrupt(mapped.at, text)))
    })
}
