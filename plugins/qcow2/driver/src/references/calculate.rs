//! Everything in an image that refers to a host cluster, each as often as it does.
//!
//! That is what refcounts count ("Host cluster management" in the specification): header, refcount table and blocks, the
//! active L1 table and those of the snapshots, the snapshot table, and what the bitmaps have; L2 tables, data clusters and
//! what compressed clusters touch once for each entry that points there.

use crate::image::Image;
use crate::metadata::l2_tables::L2Tables;
use crate::metadata::map::MetadataMap;
use crate::metadata::reference::{Reference, Structure};
use crate::metadata::structures::{Kinds, Structures};
use crate::references::calculated::CalculatedRefcounts;
use alloc::format;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult};
use instar_qcow2_format::HostCluster;

/// Count all references to clusters from `counts`' floor on. The metadata is where `metadata` says.
///
/// # Errors
/// Corruption: a reference to what lies outside the file, or on metadata, or to the cluster of a bitmap that is not its
/// own; [`ErrorCode::RefcountExhausted`]; I/O errors.
pub(crate) fn calculate(
    io: &mut dyn BlockIo,
    structures: &mut Structures<'_>,
    metadata: &MetadataMap,
    counts: &mut CalculatedRefcounts,
) -> DriverResult<()> {
    let image = structures.image();
    let mut add = |reference: Reference| {
        reference.run.clusters().try_for_each(|cluster| {
            if counts.add(cluster, reference.times) {
                return Ok(());
            }
            let offset = image.cluster_size().host_offset(cluster).unwrap_or_default();
            let text = format!("the cluster at offset {offset} has too many references");
            Err(DriverError::new(ErrorCode::RefcountExhausted, text).at(image.device, offset.0))
        })
    };
    let bitmaps = Kinds::BITMAP_TABLES | Kinds::BITMAP_DATA;
    structures.visit(io, Kinds::HEADER | Kinds::SNAPSHOTS | Kinds::REFCOUNT_BLOCKS | bitmaps, &mut add)?;
    let tables = L2Tables::read(io, structures)?;
    tables.references(image).try_for_each(&mut add)?;
    tables.each_entry(io, image, &mut |reference| {
        reference.verify_bounds(image)?;
        let clusters = &mut reference.run.clusters();
        if let Some(cluster) = clusters.find(|&cluster| metadata.contains(cluster)) {
            return Err(points_to_metadata(image, reference.at, cluster));
        }
        add(reference)
    })?;
    // The clusters of bitmaps are nobody else's.
    structures.visit(io, bitmaps, &mut |reference| {
        let mut clusters = reference.run.clusters();
        let Some(shared) = clusters.find(|&cluster| counts.get(cluster).is_some_and(|count| count != 1)) else {
            return Ok(());
        };
        let at = if reference.structure == Structure::BitmapDirectory { reference.offset.0 } else { reference.at };
        let offset = image.cluster_size().host_offset(shared).unwrap_or_default();
        Err(image.corrupt(at, format!("a bitmap at offset {offset} overlaps another structure")))
    })
}

/// The corruption of an L2 entry at byte `at` that takes a table for data.
pub(crate) fn points_to_metadata(image: &Image, at: u64, cluster: HostCluster) -> DriverError {
    let offset = image.cluster_size().host_offset(cluster).unwrap_or_default();
    image.corrupt(at, format!("an L2 entry points to offset {offset}, which is metadata"))
}
