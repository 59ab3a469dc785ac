//! `instar rebase`: put another image below an image, or none, without a change of what it reads. Data that it would
//! read differently is written into it first; then one step makes it name the new parent.

mod events;
mod open;
mod operation;
mod outcome;

pub(crate) use open::named_parent;

pub(crate) use events::Likeness;
pub use events::RebaseEvents;
pub(crate) use operation::NEW;
pub use outcome::RebaseOutcome;

use crate::devices::Cache;
use crate::error::{Error, Role};
use crate::operation::{run, Session, Settings};
use crate::sandbox::{guest_module, ModuleSpec};
use instar_guest_abi::ErrorCode;
use operation::Rebase;
use std::path::PathBuf;

/// The guest's half of the operation.
pub const MODULE: ModuleSpec<'static> = guest_module!("rebase");

/// The operator's request.
#[derive(Clone, Debug, Default)]
pub struct RebaseRequest {
    /// The image that gets another parent.
    pub image: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// The new parent's name as the image records it, and its format; `None` for no parent.
    pub backing: Option<(String, String)>,
    /// Whether to change only the record of the parent: the operator answers for the content.
    pub unsafe_mode: bool,
    /// Whether to stop before the first change.
    pub dry_run: bool,
    /// The promises of flushes and writes.
    pub cache: Cache,
    /// Plugins, directories, and the time to wait for a lock.
    pub settings: Settings,
}

/// Give an image another parent.
///
/// # Errors
/// One line that names the file and what to do.
pub fn run_rebase(request: &RebaseRequest, session: &Session) -> Result<RebaseOutcome, Error> {
    if let Some((name, _)) = &request.backing {
        open::check_name(name, request.unsafe_mode)?;
    }
    run(Rebase::new(request), session).map_err(|error| match error.path() {
        Some(path) if path == request.image => error.in_role(Role::Image),
        Some(_) if error.role().is_none() => error.in_role(Role::Backing),
        _ => error,
    })
}

/// The error for steps of an operation in the wrong order: a bug of this program.
fn out_of_order() -> Error {
    Error::new(ErrorCode::InternalOverflow, "a rebase without an image: please report this")
}
