//! Reading what a layer holds.
//!
//! * [`extents`]: what its clusters are to the reader of the layer;
//! * [`compressed`]: compressed clusters.

pub mod compressed;
pub mod extents;
