//! What comes of a rebase.

use crate::commit::as_text::path_as_text;
use serde::Serialize;
use std::path::PathBuf;

/// How a rebase went. What is serialized is the JSON of `docs/rebase.md`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RebaseOutcome {
    /// Absolute path of the image.
    #[serde(serialize_with = "path_as_text")]
    pub image: PathBuf,
    /// The same as the operator gave it.
    #[serde(skip)]
    pub image_given: PathBuf,
    /// Its format.
    pub format: String,
    /// The name of the new parent, as it is recorded; `None` if the image has none.
    pub backing: Option<String>,
    /// The format of the new parent.
    pub backing_format: Option<String>,
    /// Clusters of the image that were written to.
    pub clusters_written: u64,
    /// Guest-visible bytes that were written.
    pub bytes_written: u64,
    /// What the parents hold was not compared.
    #[serde(rename = "unsafe")]
    pub unsafe_mode: bool,
    /// Nothing was changed.
    pub dry_run: bool,
    /// What the operator should know, each one line that names a file. The observer had them before the first change.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
}
