//! Whether a driver keeps what it promises, for the tests of any plugin.
//!
//! A format says how its images are made and what they read as, without the driver ([`ImageKit`], [`Builder`]); the harness
//! does the rest, on [`MemoryDevices`](crate::memory::MemoryDevices), which hold the driver to all of the host's rules:
//!
//! - **extents** keep their promises, whatever part of a disk is asked for, and however few at once; what they say, encoded
//!   ones included, is what the independent reader reads; `extents`, `verify` and `check` change nothing;
//! - a **commit** is done, refused or run dry: the backing reads as the overlay did, nobody's file is longer than was planned,
//!   and a commit that is refused has changed nothing;
//! - a **power loss**, and any request that **fails**: the overlay reads the same at each instant, both images are sound, and
//!   running the commit again finishes it;
//! - another **parent** ([`verify_parents`]): at each instant the image names the one or the other, whole, and reads the same; a
//!   refusal has changed nothing, and a second run finishes what was interrupted;
//! - another **size** ([`verify_resizes`]): at each instant the image has the one or the other and reads as before up to there;
//!   what an image has grown by reads as zeroes, also where it was shrunk before; a second run finishes what was interrupted.
//!
//! ```
//! use instar_guest_sdk::conformance::{self, Builder};
//! use instar_guest_sdk::crash::Crashes;
//!
//! fn my_format_conforms(kit: &dyn Builder) {
//!     conformance::verify_drawn(kit, 1..9, Crashes { drawn: 1, seed: 1 });
//! }
//! ```

mod commits;
mod fixture;
mod kit;
mod layer;
mod parents;
