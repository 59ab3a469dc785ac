//! What comes of an adoption.

use crate::commit::as_text::path_as_text;
use serde::Serialize;
use std::path::PathBuf;

/// How an adoption went. What is serialized is the JSON of `docs/commit.md`.
#[derive(Clone, Debug, Serialize)]
pub struct AdoptOutcome {
    /// Absolute path that the overlay had.
    #[serde(serialize_with = "path_as_text")]
    pub overlay: PathBuf,
    /// The same as the operator gave it.
    #[serde(skip)]
    pub overlay_given: PathBuf,
    /// Format of both images.
    pub overlay_format: String,
    /// Absolute path of the target, which leads to the overlay's file now.
    #[serde(serialize_with = "path_as_text")]
    pub backing: PathBuf,
    /// As `overlay_format`.
    pub backing_format: String,
    /// The overlay has taken the target's place; with `dry_run`, it would.
    pub adopted: bool,
    /// Clusters of the overlay into which something was written that the layers below it held.
    pub clusters_kept: u64,
    /// Guest-visible bytes of that.
    pub bytes_kept: u64,
    /// Nothing was changed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Layers between the two, which nothing can read any more: absolute paths.
    #[serde(serialize_with = "crate::commit::as_text::paths_as_text", skip_serializing_if = "Vec::is_empty")]
    pub stale: Vec<PathBuf>,
    /// What the operator should know, each one line that names a file. The observer had them before the first change.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
}
