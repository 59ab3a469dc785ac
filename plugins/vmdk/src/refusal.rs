//! What the format code refuses, as the engine wants it said.

use instar_plugin_api::{ErrorCode, PluginError};
use instar_vmdk_format::{FormatError, Trouble};

/// A [`FormatError`] as the plugin's.
pub fn refused(error: FormatError) -> PluginError {
    let code = match error.trouble {
        Trouble::Unsupported => ErrorCode::UnsupportedFormat,
        Trouble::Corrupt => ErrorCode::ParseFailed,
    };
    PluginError::new(code, error.text)
}
