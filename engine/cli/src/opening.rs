//! What every command that opens images is told in the same way.

use clap::Args;
use instar::config::Config;
use instar::operation::Settings;
use instar::plugins::SearchPath;
use std::num::{IntErrorKind, ParseIntError};
use std::path::PathBuf;

/// Waiting, directories, plugins.
#[derive(Args, Debug, Default)]
pub struct OpeningArgs {
    /// Wait this many seconds for images that are in use, and then give up
    #[arg(long, value_name = "SECONDS", default_value_t, value_parser = parse_seconds)]
    pub wait: u64,
    /// Also let the names that images record lead into DIR, not only beside the image; may be given several times
    #[arg(long, value_name = "DIR")]
    pub allow_backing_dir: Vec<PathBuf>,
    /// Also load plugins from DIR; may be given several times
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
}

/// A whole number of seconds.
///
/// # Errors
/// What is wrong, in one clause.
fn parse_seconds(text: &str) -> Result<u64, String> {
    text.parse().map_err(|error: ParseIntError| match error.kind() {
        IntErrorKind::PosOverflow => "more than 2^64 - 1 seconds".to_owned(),
        _ => "not a whole number of seconds".to_owned(),
    })
}

impl OpeningArgs {
    /// Together with what is configured.
    pub fn settings(&self, config: &Config) -> Settings {
        Settings {
            search: SearchPath::for_process(&self.plugin_dir, &config.plugin_paths()),
            allowed_directories: [self.allow_backing_dir.as_slice(), &config.backing_paths()].concat(),
            wait: self.wait,
        }
    }
}
