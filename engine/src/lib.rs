//! The instar engine: plugins, chains, devices, the KVM runner and the command line. It knows no format.

// A print that panics ends the program in the middle of a commit: `terminal` and `cli::output` cannot.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod check;
pub mod cli;
pub mod commit;
pub mod config;
pub mod confine;
pub mod devices;
pub mod doctor;
pub mod error;
pub mod escape;
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
pub mod lookup;
pub mod map;
pub mod plugins;
pub mod terminal;
pub mod vm;
