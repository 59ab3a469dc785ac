//! `instar resize`: give an image another virtual size. The format's own module does so in the sandbox: it switches
//! from one size to the other in one step, so a power loss leaves an image of either size, which reads as before.

mod events;
mod operation;
mod overlays;
mod sizes;

pub use events::ResizeEvents;
pub use sizes::NewSize;

use crate::devices::ZeroWrites;
use crate::error::Error;
use crate::operation::{run, Session, Settings};
use crate::sandbox::{guest_module, ModuleSpec};
use operation::Resize;
use serde::Serialize;
use std::path::PathBuf;

/// The guest's half of the operation.
pub const MODULE: ModuleSpec<'static> = guest_module!("resize");

/// Bytes of a sector, of which virtual sizes are multiples.
pub const SECTOR: u64 = 512;

/// The space of the new part of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// It takes no space before it is written to.
    #[default]
    Off,
    /// It has its place in the image's file, but takes no disk space there.
    Metadata,
    /// The file system reserves its space.
    Falloc,
    /// It is filled with zeroes.
    Full,
}

impl Preallocation {
    /// The treatment of zeroes that get their place in the image.
    fn zero_writes(self) -> ZeroWrites {
        match self {
            Self::Off | Self::Full => ZeroWrites::Written,
            Self::Metadata => ZeroWrites::Holes,
            Self::Falloc => ZeroWrites::Reserved,
        }
    }
}

/// The operator's request.
#[derive(Clone, Debug, Default)]
pub struct ResizeRequest {
    /// The image.
    pub image: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// The requested size.
    pub size: NewSize,
    /// Whether it may become smaller, which deletes the data past the new end.
    pub shrink: bool,
    /// The space of the new part of the disk.
    pub preallocation: Preallocation,
    /// Whether to resize although other images on this one would read other data.
    pub ignore_overlays: bool,
    /// Whether to report the effect, and change nothing.
    pub dry_run: bool,
    /// Plugins, directories, and the time to wait for a lock.
    pub settings: Settings,
}

/// The result of a resize. It serializes to the JSON of `docs/resize.md`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ResizeOutcome {
    /// The image's format.
    pub format: String,
    /// Its old virtual size in bytes.
    pub old_virtual_size: u64,
    /// Its new virtual size in bytes; in a dry run, the size that it would have.
    pub virtual_size: u64,
    /// Whether it was a dry run, which changes nothing.
    pub dry_run: bool,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
    /// Warnings for the operator, one line each.
    pub warnings: Vec<String>,
}

/// Give an image another virtual size. An image that already has this size stays as it is.
///
/// # Errors
/// One line that names the file and what to do. A refusal leaves the image byte-identical.
pub fn run_resize(request: &ResizeRequest, session: &Session) -> Result<ResizeOutcome, Error> {
    run(Resize::new(request), session)
        .map_err(|error| error.of_image(&request.image, Some(crate::error::Role::Ancestor)))
}
