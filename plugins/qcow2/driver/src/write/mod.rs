//! Writing into a backing.
//!
//! * [`backing`]: the open backing, in parts; [`windows`], [`cluster_extent`]: how extents fall onto its clusters;
//! * [`action`], [`subclusters`], [`contents`]: what is to be done with a cluster;
//! * [`plan`], [`touched`], [`lost_data`], [`cross_check`], [`summary`]: what is verified and counted before the first
//!   change;
//! * [`window`], [`cluster_data`], [`subcluster_data`], [`remap`]: the changes, in their order;
//! * [`compressing`], [`gather`], [`packer`]: the changes where clusters are compressed;
//! * [`enabled_bitmaps`], [`record_bits`]: the persistent bitmaps that are kept up.

pub mod action;
pub mod backing;
pub mod cluster_data;
pub mod cluster_extent;
pub mod compressing;
pub mod contents;
pub mod cross_check;
pub mod enabled_bitmaps;
pub mod gather;
pub mod lost_data;
pub mod packer;
pub mod plan;
pub mod record_bits;
pub mod remap;
pub mod subcluster_data;
pub mod subclusters;
pub mod summary;
pub mod touched;
pub mod window;
pub mod windows;
