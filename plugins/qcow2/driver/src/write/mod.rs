//! Writing into a backing.
//!
//! * [`sink`]: the open backing; [`windows`], [`cluster_extent`]: how extents fall onto its clusters;
//! * [`action`], [`subclusters`], [`contents`]: what is to be done with a cluster;
//! * [`plan`], [`planned`], [`cross_check`]: what is verified and counted before the first change;
//! * [`window`], [`cluster_data`], [`subcluster_data`], [`remap`]: the changes, in their order;
//! * [`enabled_bitmaps`], [`record_bits`]: the persistent bitmaps that are kept up.

pub mod action;
pub mod cluster_data;
pub mod cluster_extent;
pub mod contents;
pub mod cross_check;
pub mod enabled_bitmaps;
pub mod plan;
pub mod planned;
pub mod record_bits;
pub mod remap;
pub mod sink;
pub mod subcluster_data;
pub mod subclusters;
pub mod window;
pub mod windows;
