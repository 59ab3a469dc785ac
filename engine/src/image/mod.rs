//! The images of a chain: their files, their order, and the permission to write them.
//!
//! An overlay is hostile, and it names other files. Every file that an image names passes one [gate](Gate) before it is
//! opened, and the gate judges the file that the name really leads to: neither its text, nor a link, nor a race decides.

mod access;
mod advice;
mod chain;
mod chain_image;
mod children;
mod failures;
mod files;
mod gate;
#[cfg(test)]
mod gate_tests;
mod identify;
mod locking;
mod loop_device;
mod loop_users;
mod named;
mod names;
mod open;
mod open_files;
mod parents;
mod proven;
mod roots;
mod scan;
mod snapshot;
mod target;
mod undo_directory;
mod unfinished;
mod users;

pub use access::Access;
pub use advice::{RecordedRole, Recorder};
pub use chain::{parent_is_unrecorded, Descent};
pub use chain_image::{ChainImage, Doubt, ExtraFile};
pub use children::{counted, Child, ChildSearch, Children};
pub use files::{add_new_files, open_extra_files, FilesOf};
pub use gate::{Gate, Located};
pub use identify::{unknown_format, Recorded};
pub use locking::{prepare_to_lock, refuse_used_through_loop};
pub use loop_users::remember_loops;
pub use named::NamedFile;
pub use names::{file_name, FileName, NoFile};
pub use open::OpenedFile;
pub use open_files::allow_many as allow_many_open_files;
pub use parents::{check_immediate_parent, check_parents, parent_mismatch};
pub use roots::Roots;
pub use snapshot::SnapshotName;
pub use target::{resolve_backing, BackingChoice, Target};
pub use undo_directory::{undo_directory, use_undo_directory, DeviceIdentity, UndoDirectory};
pub use unfinished::unfinished_below;
