//! The result of a rebase.

use crate::commit::as_text::path_as_text;
use serde::Serialize;
use std::path::PathBuf;

/// The result of a rebase. It serializes to the JSON of `docs/rebase.md`.
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
    /// The recorded name of the new parent; `None` if the image has none.
    pub backing: Option<String>,
    /// The format of the new parent.
    pub backing_format: Option<String>,
    /// Clusters of the image that were written to.
    pub clusters_written: u64,
    /// Guest-visible bytes that were written.
    pub bytes_written: u64,
    /// Whether the content of the parents was not compared.
    #[serde(rename = "unsafe")]
    pub unsafe_mode: bool,
    /// Whether it was a dry run, which changes nothing.
    pub dry_run: bool,
    /// Warnings for the operator, each one line that names a file. The observer had them before the first change.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
}
