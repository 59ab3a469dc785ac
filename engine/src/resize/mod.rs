//! `instar resize`: give an image another virtual size. The format's own module does so in the sandbox: it switches from the one
//! size to the other at one stroke, so that a power loss leaves an image of either, which reads as before.

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

/// The guest's half.
pub const MODULE: ModuleSpec<'static> = guest_module!("resize");

/// Bytes of a sector: virtual sizes are multiples of it.
pub const SECTOR: u64 = 512;

/// What becomes of the space of what is new of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// It takes none before something is written.
    #[default]
    Off,
    /// It has its place in the image, and takes no space there.
    Metadata,
    /// The file system reserves it.
    Falloc,
    /// Zeroes are written.
    Full,
}

impl Preallocation {
    /// What becomes of the zeroes that are to have their place in the image.
    fn zero_writes(self) -> ZeroWrites {
        match self {
            Self::Off | Self::Full => ZeroWrites::Written,
            Self::Metadata => ZeroWrites::Holes,
            Self::Falloc => ZeroWrites::Reserved,
        }
    }
}

/// What the operator asks for.
#[derive(Clone, Debug, Default)]
pub struct ResizeRequest {
    /// The image.
    pub image: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// The size that it is to have.
    pub size: NewSize,
    /// It may become smaller, which deletes what is past the new end.
    pub shrink: bool,
    /// What becomes of the space of what is new of the disk.
    pub preallocation: Preallocation,
    /// Resize although other images have this one as their backing and would read something else.
    pub ignore_overlays: bool,
    /// Say what would be done, and change nothing.
    pub dry_run: bool,
    /// Plugins, directories, waiting.
    pub settings: Settings,
}

/// What came of a resize. What is serialized is the JSON of `docs/resize.md`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ResizeOutcome {
    /// The image's format.
    pub format: String,
    /// The virtual size in bytes that it had.
    pub old_virtual_size: u64,
    /// The one that it has now; in a dry run, the one that it would have.
    pub virtual_size: u64,
    /// Nothing was changed: it was a dry run.
    pub dry_run: bool,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
    /// What should be known besides, one line each.
    pub warnings: Vec<String>,
}

/// Give an image another virtual size. One that has it already stays as it is.
///
/// # Errors
/// One line that names the file and what to do. A refusal leaves the image byte-identical.
pub fn run_resize(request: &ResizeRequest, session: &Session) -> Result<ResizeOutcome, Error> {
    run(Resize::new(request), session)
        .map_err(|error| error.of_image(&request.image, Some(crate::error::Role::Ancestor)))
}
