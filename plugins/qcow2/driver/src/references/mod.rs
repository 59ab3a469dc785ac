//! References to host clusters, counted: what refcounts should say.
//!
//! * [`cluster_set`], [`calculated`]: sets and counts of clusters in bounded memory;
//! * [`calculate`]: counting everything that refers to a cluster;
//! * [`compare`]: refusing refcounts that are too low;
//! * [`walk`]: the counts against refcounts and flags, for code that examines or repairs an image.

pub mod calculate;
pub mod calculated;
pub mod cluster_set;
pub mod compare;
pub mod walk;
