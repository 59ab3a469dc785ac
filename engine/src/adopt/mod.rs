//! `instar commit --by-adoption`: the overlay becomes the image that it is committed into.
//!
//! A commit writes what the overlay holds into the target. Where the overlay holds most of what is read, the other way round is
//! less work: what only the layers down to the target hold is written into the overlay, which then names the target's parent,
//! as a [rebase](crate::rebase) does it, and takes the target's name. The name of the overlay is gone afterwards.
//!
//! The order, and the crash that each step survives:
//!
//! 1. the guest writes into the overlay what is below it, durably. A crash leaves an overlay that reads what it read, and the
//!    target as it was;
//! 2. the overlay gets the target's owner, mode and extended attributes, and a mark that names the target, durably. A crash
//!    leaves the same;
//! 3. the guest has the overlay name the target's parent, in one step. A crash leaves the same, or an overlay that no longer needs
//!    the target;
//! 4. one rename gives the overlay's file the target's name; then the directory is flushed. A crash leaves either name leading to
//!    what it led to, or the target's to the overlay's file and the overlay's to nothing.
//!
//! A crash between the last two leaves an overlay that no longer leads to the target. By the mark a second run knows that
//! state, and only renames. That is why the target has to be named: without it, the second run would go one layer deeper. The mark is
//! removed at the end; a crash before that leaves one that names a file without a name.
//!
//! Two limits stay. The overlay has to lie in the target's directory: between the last two steps it already names the target's
//! parent, by a name that is relative to that directory. And formats that record identities are not taken: the target's name would
//! lead to another identity than its other children, wherever they lie, have recorded.

mod admit;
mod mark;
mod operation;
mod outcome;
mod resume;
mod take_over;

pub use outcome::AdoptOutcome;

use crate::devices::Cache;
use crate::error::{Error, Role};
use crate::operation::{run, Session, Settings};
use instar_guest_abi::ErrorCode;
use operation::Adopt;
use std::path::PathBuf;

/// What the operator asks for.
#[derive(Clone, Debug, Default)]
pub struct AdoptRequest {
    /// The overlay.
    pub overlay: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// The image of its backing chain whose place it takes. A relative name begins at the overlay's directory.
    pub base: PathBuf,
    /// The format of that image, if the operator names it.
    pub base_format: Option<String>,
    /// Let the target's virtual size grow to the overlay's.
    pub resize_backing: bool,
    /// Go on although other images are on the target.
    pub ignore_siblings: bool,
    /// Stop before the first change.
    pub dry_run: bool,
    /// What flushes and writes promise.
    pub cache: Cache,
    /// Plugins, directories, waiting.
    pub settings: Settings,
}

/// Have an overlay take the place of an image below it.
///
/// # Errors
/// One line that names the file and what to do.
pub fn run_adopt(request: &AdoptRequest, session: &Session) -> Result<AdoptOutcome, Error> {
    if request.cache == Cache::Unsafe {
        let message =
            "--by-adoption replaces what a power loss would need, and -t unsafe flushes nothing: use another mode";
        return Err(Error::new(ErrorCode::BadUsage, message));
    }
    run(Adopt::new(request), session).map_err(|error| match error.path() {
        Some(path) if path == request.overlay => error.in_role(Role::Overlay),
        Some(_) if error.role().is_none() => error.in_role(Role::Backing),
        _ => error,
    })
}

/// The order of an operation was not kept: a mistake of this program.
fn out_of_order() -> Error {
    Error::new(ErrorCode::InternalOverflow, "an adoption without images: please report this")
}
