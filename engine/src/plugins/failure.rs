//! Why a call into a plugin gave no answer.

use instar_guest_abi::ErrorCode;
use std::io;

/// The reason why a call into a plugin gave no answer. The text names the plugin or the fault, never the image, which the
/// caller adds.
#[derive(Debug, thiserror::Error)]
pub enum PluginFailure {
    /// The plugin refused the image or the request. The text is the plugin's.
    #[error("{message}")]
    Refused {
        /// An `ERROR_*` code.
        code: ErrorCode,
        /// One clause.
        message: String,
    },
    /// The host could not read the image.
    #[error("reading at byte {offset} failed: {source}")]
    Io {
        /// Byte offset of the read.
        offset: u64,
        /// The error of the host.
        source: io::Error,
    },
    /// The plugin broke the contract: it panicked, or gave an answer that no plugin may give.
    #[error("the {plugin} plugin is faulty: {message}")]
    Faulty {
        /// Name of the plugin.
        plugin: String,
        /// Its fault.
        message: String,
    },
}

impl PluginFailure {
    /// The code under which a commit fails for this reason.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Refused { code, .. } => *code,
            Self::Io { .. } => ErrorCode::OverlayIo,
            Self::Faulty { .. } => ErrorCode::PluginUnavailable,
        }
    }
}
