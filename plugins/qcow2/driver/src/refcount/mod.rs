//! Refcounts: looked up, changed, and how clusters are allocated by them.
//!
//! * [`blocks`]: the refcount table and its blocks; [`in_use`]: which clusters of a range have a refcount;
//! * [`allocator`]: new clusters; [`free_clusters`]: those within the file that can be used again;
//! * [`forecast`]: what allocating would come to;
//! * `space`, `publish`: clusters of an image that is changed, and the order in which new ones become durable.

pub mod allocator;
pub mod blocks;
pub mod forecast;
pub mod free_clusters;
pub mod in_use;
pub(crate) mod publish;
pub(crate) mod space;
