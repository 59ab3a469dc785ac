//! Reading what a layer holds.
//!
//! * [`extents`]: what its clusters are to the reader of the layer;
//! * [`compressed`]: compressed clusters;
//! * [`ahead`]: those that come next, decoded side by side.

mod ahead;
pub mod compressed;
pub mod extents;
