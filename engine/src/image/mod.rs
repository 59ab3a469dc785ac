//! The images of a commit: which files they are, in which order, and which of them may be written.
//!
//! An overlay is hostile, and it names other files. Every file that an image names passes one gate
//! ([`write_target`]) before the file system is touched, and is opened so that no link or race leads elsewhere.

mod base;
mod discover;
mod files;
mod identify;
mod open;
mod open_files;
mod parents;
pub mod write_target;

pub use base::{resolve_backing, BackingChoice, Target};
pub use discover::discover_backing_chain;
pub use files::{open_extra_files, ExtraFile, FilesOf};
pub use open::{Access, ChainImage, Identity, OpenedFile};
pub use open_files::allow_many as allow_many_open_files;
pub use parents::{check_immediate_parent, check_parents, parent_mismatch};
