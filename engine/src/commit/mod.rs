//! `instar commit`: merge an overlay, and the layers between it and a target, into the target.
//!
//! Up to the first change, all steps only read, so a refused commit leaves all files byte-identical, also if the guest
//! refuses it in its steps "check" and "plan".

mod admission;
mod admitted;
pub(crate) mod as_text;
mod atomic;
mod bitmaps;
mod changed;
mod delete;
mod digest;
mod end;
mod events;
mod operation;
mod outcome;
mod plan;
mod refusals;
mod relinks;
mod repeated;
mod request;
mod snapshot;
mod undo_room;
mod verdict;
mod verify;
mod wipe;

use admitted::Admitted;
pub use atomic::AtomicWay;
pub(crate) use atomic::REPLACED_MARK;
pub(crate) use bitmaps::allowance as room_for_bitmaps;
pub use bitmaps::{MergedBitmap, RESULTS as BITMAP_RESULTS};
pub use digest::DiskDigest;
pub use events::CommitEvents;
pub use outcome::{CommitOutcome, GuestRun, Preview};
pub use plan::PlanBounds;
pub use relinks::Relinked;
pub use request::{CommitMode, CommitRequest};
pub(crate) use verdict::become_stale;

use crate::devices::Cache;
use crate::error::{Error, Role};
use crate::operation::{run, Session};
use crate::sandbox::{guest_module, ModuleSpec};
use instar_guest_abi::ErrorCode;
use operation::Commit;
use std::path::Path;

/// The guest's half of the operation.
pub const MODULE: ModuleSpec<'static> = guest_module!("commit");

/// Commit an overlay.
///
/// # Errors
/// One line that names the file and what to do.
pub fn run_commit(request: &CommitRequest, session: &Session) -> Result<CommitOutcome, Error> {
    if request.atomic && request.cache == Cache::Unsafe {
        let message = "--atomic promises what a crash leaves, and -t unsafe promises nothing: leave out one of them";
        return Err(Error::new(ErrorCode::BadUsage, message));
    }
    let role_of = |path: &Path| if path == request.overlay { Role::Overlay } else { Role::Backing };
    run(Commit::new(request), session).map_err(|error| match error.path().map(role_of) {
        Some(role) => error.in_role(role),
        None => error,
    })
}
