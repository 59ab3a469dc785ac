//! Operations on images: [`Operation`] has what differs between `commit`, `check` and `map`, and [`run`] owns the order that
//! they share. A new operation is a new instance of [`Operation`], a guest module and a command.

mod attach;
mod codes;
mod failure;
mod handler;
mod images;
mod meter;
mod notes;
mod observer;
mod run;
mod session;
mod space;
#[cfg(test)]
pub(crate) mod test_buffers;
mod timing;
mod verdict;

pub use crate::cancel::Cancel;
pub use attach::{Attached, DevicePaths};
pub use failure::GuestFailure;
pub(crate) use handler::{decode, enter_planned};
pub use handler::{Events, Handler};
pub use images::{Grants, ImageSet, Named, NamedDirectory, Opener, Slot};
pub use meter::Meter;
pub use observer::{Observer, Progress, Stage};
pub use run::{run, Ended, Operation, Settings};
pub use session::Session;
pub(crate) use space::{block_size, free_in, free_space, taken_space, PlanNeeds, Room, Space};
pub use timing::Timing;
pub use verdict::{ask, ask_below};
