//! What the guest's operations share: several layers seen as one disk, what lies below an image, what tells two
//! such disks apart, which data is zeroes, and how an operation reports to its host.
#![no_std]

extern crate alloc;

mod below;
mod detected;
mod differences;
mod layered_bitmaps;
mod layers;
mod report;

pub use below::{read_extent, Ancestors, Opener};
pub use detected::{is_zero, Detected};
pub use differences::{Differences, View};
pub use layers::{Layers, Place, Seen};
pub use report::{Failed, Reporter};
