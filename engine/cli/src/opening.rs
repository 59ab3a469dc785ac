//! What every command that opens images is told in the same way.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::Args;
use instar::config::Config;
use instar::operation::Settings;
use instar::plugins::SearchPath;
use instar::sandbox::{Sandbox, SandboxChoice};
use std::num::{IntErrorKind, ParseIntError};
use std::path::PathBuf;

/// The sandbox, waiting, directories, plugins.
#[derive(Args, Debug, Default)]
pub struct OpeningArgs {
    /// Where images are read and written: a virtual machine, a process that can do nothing (weaker, and needs no /dev/kvm), or
    /// whichever works. Default: as configured, else kvm
    #[arg(long, value_name = "SANDBOX", value_parser = sandbox_parser())]
    pub sandbox: Option<SandboxChoice>,
    /// Wait this many seconds for images that are in use, and then give up
    #[arg(long, value_name = "SECONDS", default_value_t, allow_negative_numbers = true, value_parser = parse_seconds)]
    pub wait: u64,
    /// Also allow the files that images name in DIR, not only beside the image; may be given several times
    #[arg(long, value_name = "DIR")]
    pub allow_backing_dir: Vec<PathBuf>,
    /// Also load plugins from DIR; may be given several times
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
}

/// The parser of a sandbox's name, which lists all of them.
pub fn sandbox_parser() -> impl TypedValueParser<Value = SandboxChoice> {
    let names = PossibleValuesParser::new(SandboxChoice::ALL.map(|choice| choice.name()));
    names.map(|name| SandboxChoice::from_name(&name).unwrap_or_default())
}

/// A whole number of seconds.
///
/// # Errors
/// What is wrong, in one clause.
pub(super) fn parse_seconds(text: &str) -> Result<u64, String> {
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
            sandbox: self.sandbox.or(config.sandbox()).unwrap_or_default(),
            undo_directory: config.undo_path(),
        }
    }
}
