//! What the guest's operations share: several layers seen as one disk, what lies below an image, what tells two
//! such disks apart, which data is zeroes, and how an operation reports to its host.
#![no_std]

extern crate alloc;

mod below;
mod detected;
mod differences;
mod filtered;
mod layered_bitmaps;
mod layers;
mod report;
mod zero_runs;

pub use below::{read_extent, Ancestors, Opener};
pub use detected::Detected;
pub use differences::{Differences, View};
pub use filtered::{Filter, Filtered};
pub use layers::{Layers, Place, Seen};
pub use report::{Failed, Reporter};
pub use zero_runs::{is_zero, ZeroRun, ZeroRuns};
