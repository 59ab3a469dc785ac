//! Finding, checking and loading format plugins.
//!
//! In the order in which a plugin library passes through it: [`SearchPath`] says where to look, `trust` looks at
//! owner and mode of the opened file, `elf` at its content, `library` loads it and asks for its interface,
//! [`Plugin`] calls it and checks what it answers, [`Registry`] finds the plugin for an image.

mod answers;
mod budget;
mod bundle;
mod elf;
mod failure;
mod file_image;
mod foreign;
mod identify;
mod interface;
mod library;
mod plugin;
mod reader;
mod registry;
mod search;
mod trust;

pub use bundle::Bundle;
pub use failure::PluginFailure;
pub use file_image::FileImage;
pub use foreign::Foreign;
pub use identify::{Identified, IdentifyError, Mark, DAMAGED};
pub use plugin::Plugin;
pub use reader::{ImageFiles, ImageRead};
pub use registry::{Registry, Skipped};
pub use search::{is_elevated, SearchPath, FILE_PREFIX, FILE_SUFFIX, PATH_VARIABLE};
pub use trust::{Distrust, TrustedDirectory};

/// For the fuzz targets.
pub(crate) mod fuzzing {
    /// Check the library in `data`.
    pub fn check(data: &[u8]) -> Result<(), String> {
        super::elf::check(data, data.len() as u64, abi_stable::library::ROOT_MODULE_LOADER_NAME)
    }
}
