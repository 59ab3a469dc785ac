//! Builds the guest half of an instar plugin (or the guest's own core) from a build script.
//!
//! ```no_run
//! // build.rs of a plugin whose guest half is the package in `driver/`, with a binary `qcow2-module`:
//! instar_guest_build::GuestModule::new("instar-qcow2-driver", "driver", "qcow2-module").build();
//! // in the plugin: include_bytes!(concat!(env!("OUT_DIR"), "/qcow2-module.elf"))
//! ```
//!
//! The binary is built with the feature `guest` by a cargo of its own, with a target directory of its own
//! (shared by all guest modules of one outer target directory), so it neither waits for the outer cargo's
//! lock nor inherits its profile, its flags or clippy's wrapper. The bytes depend on the sources and the tool chain,
//! not on the folder or the outer profile. With `INSTAR_GUEST_SYMBOLS` set in the environment, a module keeps symbols and line
//! numbers for `addr2line`.

mod dep_info;
mod environment;
mod link;
mod module;

pub use module::{BuildError, GuestModule};
