//! `instar compare`: do two images, each with the layers below it, hold the same disk? The formats' own modules look up their
//! tables in the sandbox; the host compares the bytes that are stored plainly in a file, and skips holes.

mod contents;
mod events;
mod operation;

pub(crate) use contents::Contents;
pub use events::CompareEvents;

use crate::error::{Error, Role};
use crate::operation::{run, Session, Settings};
use crate::sandbox::{guest_module, ModuleSpec};
use operation::Compare;
use serde::Serialize;
use std::path::PathBuf;

/// The guest's half.
pub const MODULE: ModuleSpec<'static> = guest_module!("compare");

/// The operator's request.
#[derive(Clone, Debug, Default)]
pub struct CompareRequest {
    /// The two images.
    pub images: [PathBuf; 2],
    /// Their formats, where the operator names them.
    pub formats: [Option<String>; 2],
    /// The sizes, and what is allocated, have to be the same as well.
    pub strict: bool,
    /// Read the images even while another process writes to them.
    pub force_share: bool,
    /// Plugins, directories, waiting.
    pub settings: Settings,
}

/// A difference between two images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "offset")]
pub enum Difference {
    /// The virtual sizes. Counts only in a strict comparison.
    Size,
    /// The content of the sector at this guest offset, in bytes.
    Content(u64),
    /// Whether the bytes from this guest offset on are allocated, zero, or compressed. Counts only in a strict comparison.
    Allocation(u64),
}

/// The result of a comparison. Serializes to the JSON of `docs/compare.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CompareOutcome {
    /// Their virtual sizes in bytes.
    pub virtual_sizes: [u64; 2],
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
    /// The first difference, if there is one.
    pub difference: Option<Difference>,
}

/// Compare two images. The part of the longer disk past the end of the other one counts as equal if it is zeroes.
///
/// # Errors
/// One line that names the file and what to do: when the images could not be compared to the end.
pub fn run_compare(request: &CompareRequest, session: &Session) -> Result<CompareOutcome, Error> {
    let is_named = |error: &Error| error.path().is_some_and(|path| request.images.iter().any(|image| image == path));
    run(Compare::new(request), session).map_err(|error| match (is_named(&error), error.path()) {
        (true, _) => error.in_role(Role::Image),
        (false, Some(_)) => error.in_role(Role::Ancestor),
        (false, None) => error,
    })
}
