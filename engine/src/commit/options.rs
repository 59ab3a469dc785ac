//! What the operator wants.

use crate::devices::CacheMode;
use std::ffi::OsString;
use std::path::PathBuf;

/// What the operator wants.
#[derive(Clone, Debug, Default)]
pub struct CommitOptions {
    /// The overlay.
    pub overlay: PathBuf,
    /// Its format, if it was named.
    pub format: Option<String>,
    /// The image to commit into, if it was named.
    pub base: Option<OsString>,
    /// Directories that a recorded backing may be in.
    pub allowed_directories: Vec<PathBuf>,
    /// How durable writes are.
    pub cache: CacheMode,
}
