//! The command line.

pub mod create;
mod create_file;
pub mod error;
pub mod escape;
pub mod info;
mod info_text;
pub mod output;
pub mod plugins;
pub mod size;

pub use error::CliError;
pub use output::OutputFormat;
