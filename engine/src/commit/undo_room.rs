//! The disk space of an undo log: the blocks that the plan may change in place, and the records of their places.

use super::outcome::pieces;
use super::Admitted;
use crate::undo::{FIRST, KEPT_BLOCK, MOST_DATA, RECORD, SOURCE};
use instar_guest_protocol::commit::Plan;

/// Blocks of the target's tables that a cluster changes: an entry of a mapping table, of its copy, and of a refcount block.
const TABLES: u64 = 3;
/// Blocks of headers, directories and the like, which any commit may change.
const OTHERS: u64 = 64;

/// Compute the maximum in bytes that an undo log takes of the disk, for these writes. Only the write decides where
/// clusters will lie, so each may overwrite old data. The log keeps nothing past the present end of the file.
#[must_use]
pub fn log_room(plan: &Plan, admitted: &Admitted) -> u64 {
    let whole = admitted.length.div_ceil(KEPT_BLOCK);
    let cluster = admitted.units().backing;
    let (allocated, pieces) = pieces(plan);
    let data = plan.bytes.max(plan.new_data_clusters.saturating_mul(cluster));
    let written = data.saturating_add(plan.new_metadata_clusters.saturating_mul(cluster));
    // What does not begin and end with a block takes one more.
    let tables = plan.clusters.saturating_mul(TABLES.saturating_add(admitted.bitmaps));
    let ranges = pieces.saturating_add(allocated).saturating_add(tables).saturating_add(OTHERS);
    let blocks = written.div_ceil(KEPT_BLOCK).saturating_add(ranges.saturating_mul(2));
    // A repair may go over all of the tables.
    let (blocks, ranges) = if admitted.repairs { (whole, whole) } else { (blocks.min(whole), ranges.min(whole)) };
    if blocks == 0 {
        return 0;
    }
    let data = blocks.saturating_mul(KEPT_BLOCK);
    let records = ranges.saturating_add(data / MOST_DATA).saturating_add(1);
    let bytes = data.saturating_add(records.saturating_mul(RECORD as u64)).saturating_add(FIRST);
    let bytes = bytes.saturating_add(admitted.sources.saturating_mul(SOURCE as u64));
    bytes.checked_next_multiple_of(admitted.block.max(1)).unwrap_or(u64::MAX)
}
