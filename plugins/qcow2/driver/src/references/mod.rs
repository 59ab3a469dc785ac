//! References to host clusters, counted: what refcounts should say.
//!
//! * [`cluster_set`], [`calculated`]: sets and counts of clusters in bounded memory;
//! * [`calculate`]: counting everything that refers to a cluster;
//! * [`compare`]: the counts against the refcounts.

pub mod calculate;
pub mod calculated;
pub mod cluster_set;
pub mod compare;
