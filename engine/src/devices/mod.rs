//! The images of a commit as devices: opened once, locked as QEMU locks them, and a mover of blocks that knows
//! nothing of what it moves.
//!
//! [`ImageFile`] is an opened image, [`lock`] keeps others out, [`DeviceSet`] says which of them the guest may read and
//! change, and [`BlockMover`] executes its requests after [`check`] has found nothing wrong with them.

mod cache;
mod check;
mod copy;
mod device;
mod file;
pub mod lock;
mod mover;
mod stats;
mod transfer;
mod zero;

pub use cache::CacheMode;
pub use device::{Device, DeviceSet};
pub use file::{errno_text, Access, FileIdentity, ImageFile, OpenError};
pub use mover::BlockMover;
pub use stats::IoStats;
