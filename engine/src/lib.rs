//! The instar library: operations on disk images whose metadata is handled in a sandbox. It knows no format: those are plugins.
//!
//! It prints nothing, installs no signal handler, and ends no process: it reports to an [`Observer`](operation::Observer), a
//! [`Cancel`](operation::Cancel) ends an operation, and an [`Error`](error::Error) explains a failure. Only a
//! [`Session`](operation::Session) made for that purpose confines the process.

pub mod adopt;
pub mod bytes;
pub mod cancel;
pub mod check;
pub mod commit;
pub mod compare;
pub mod config;
pub mod confine;
pub mod convert;
pub mod create;
pub mod devices;
pub mod doctor;
pub mod error;
pub mod escape;
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
pub mod info;
pub mod lookup;
pub mod map;
pub mod measure;
pub mod nearest;
pub mod operation;
mod others;
pub mod plugins;
pub mod rebase;
pub mod recover;
pub mod resize;
pub mod sandbox;
pub mod undo;
pub mod worker;
