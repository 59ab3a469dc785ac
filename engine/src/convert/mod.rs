//! `instar convert`: the disk that an image shows, with everything below it, becomes a new image of any format.
//!
//! The new image is created as by [`create`](crate::create), in a file that has no name; it is filled in the sandbox by the
//! same steps as a commit's; and it gets its name when it is complete and durable.

mod operation;

use crate::devices::Cache;
use crate::error::{Error, Role};
use crate::image::SnapshotName;
use crate::operation::{run, Session, Settings};
use crate::sandbox::{guest_module, ModuleSpec};
use operation::Convert;
use serde::Serialize;
use std::path::PathBuf;

/// The guest's half.
pub const MODULE: ModuleSpec<'static> = guest_module!("convert");

/// What the operator asks for.
#[derive(Clone, Debug, Default)]
pub struct ConvertRequest {
    /// The image that is read, with everything below it.
    pub source: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// The internal snapshot of it that is read instead of its own disk.
    pub snapshot: Option<SnapshotName>,
    /// Read it even if something else is writing to it.
    pub force_share: bool,
    /// The image that is made. A file of that name is replaced.
    pub target: PathBuf,
    /// Its format.
    pub target_format: String,
    /// Options of that format.
    pub options: Vec<(String, String)>,
    /// Bytes that may move per second; 0 is no limit.
    pub rate_limit: u64,
    /// What writes to the target promise.
    pub cache: Cache,
    /// Plugins, directories, waiting.
    pub settings: Settings,
}

/// What was made. What is serialized is the JSON of `docs/convert.md`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConvertOutcome {
    /// The format of the image that was read.
    pub source_format: String,
    /// The format of the new image.
    pub target_format: String,
    /// Bytes of the disk that was read.
    pub source_virtual_size: u64,
    /// Bytes of the new one: more, if its format has not every size.
    pub target_virtual_size: u64,
    /// Bytes that are data in the new image; the others were zero in what was read.
    pub bytes_converted: u64,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
    /// What the operator should know, each one line that names a file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Convert an image.
///
/// # Errors
/// One line that names the file and what to do. At the target's name stands what stood there before.
pub fn run_convert(request: &ConvertRequest, session: &Session) -> Result<ConvertOutcome, Error> {
    let result = run(Convert::new(request), session);
    // The guest's steps are those of a commit: what is read is no overlay here, and the target is nobody's backing.
    result.map_err(|error| match error.path() {
        Some(path) if path == request.target => error.with_role(None),
        _ => error.with_role(None).of_image(&request.source, Some(Role::Ancestor)),
    })
}
