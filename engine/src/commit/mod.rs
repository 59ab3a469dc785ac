//! `instar commit`: everything around the guest that does it.
//!
//! [`run_commit`] goes through the steps in order: nothing is changed before the guest, having verified everything,
//! asks for it.

mod attach;
mod backing;
mod error;
mod failure;
mod guest;
mod interrupt;
mod options;
mod probe;
mod render;
mod result;
mod run;
mod state;
mod trace;
mod verdict;

pub use attach::{open_chain_devices_rw, Attached};
pub use backing::resolve_backing;
pub use error::CommitError;
pub use failure::{map_commit_error, map_vm_error, GuestFailure, Names, Step};
pub use guest::{run_commit_guest, GuestRun};
pub use interrupt::{catch_signals, is_interrupted};
pub use options::CommitOptions;
pub use probe::probe_commit_target;
pub use render::{render_commit_error, render_commit_success};
pub use result::CommitRunResult;
pub use run::run_commit;
pub use state::Changed;
pub use trace::Trace;
pub use verdict::give_verdicts;
