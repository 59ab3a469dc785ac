//! The command line.

use super::create::CreateArgs;
use super::info::InfoArgs;
use super::plugins::PluginsArgs;
use super::size::parse_size;
use super::OutputFormat;
use crate::devices::CacheMode;
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

/// Commit disk image overlays, with image metadata handled in a sandbox.
#[derive(Parser, Debug)]
#[command(name = "instar", version, about, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Merge an overlay into the image that it is backed by, and empty it
    Commit(CommitArgs),
    /// Show what an image is
    Info(InfoArgs),
    /// Make a new, empty image
    Create(CreateArgs),
    /// List the format plugins
    Plugins(PluginsArgs),
}

/// Merge an overlay into the image that it is backed by, and empty it.
///
/// Nothing is changed before everything that can refuse has been asked. At every instant the overlay reads what it read
/// before; if the commit is interrupted, running it again finishes it.
#[derive(Args, Debug)]
pub struct CommitArgs {
    /// The overlay
    #[arg(value_name = "FILENAME")]
    pub filename: PathBuf,
    /// Format of the overlay; found out when absent. An image of another format is refused
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Commit into this image of the overlay's backing chain; a relative name begins at the overlay's directory. By default
    /// the overlay's recorded parent
    #[arg(short, long, value_name = "BASE")]
    pub base: Option<OsString>,
    /// Do not empty the overlay afterwards
    #[arg(short = 'd')]
    pub keep_overlay: bool,
    /// Show progress on stderr
    #[arg(short, long)]
    pub progress: bool,
    /// Print nothing on success
    #[arg(short, long)]
    pub quiet: bool,
    /// Commit at most this many bytes per second; 0 for no limit
    #[arg(short, long, value_name = "BYTES/S", value_parser = rate)]
    pub rate_limit: Option<u64>,
    /// Cache mode of both images
    #[arg(short = 't', long, value_enum, default_value_t, value_name = "MODE")]
    pub cache: CacheMode,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    /// Let a smaller backing grow to the overlay's virtual size
    #[arg(long)]
    pub resize_backing: bool,
    /// Do everything up to the first change, and show what would be committed
    #[arg(long)]
    pub dry_run: bool,
    /// A directory outside the overlay's own from which a recorded backing may be written; repeatable
    #[arg(long, value_name = "DIR")]
    pub allow_backing_dir: Vec<PathBuf>,
    /// A directory with more plugins; repeatable
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
    /// Tell on stderr what is loaded, resolved and measured
    #[arg(short, long)]
    pub verbose: bool,
}

fn rate(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| "not a number of bytes: use digits and a suffix K, M, G, T, P or E".to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn commit(args: &[&str]) -> Result<CommitArgs, clap::Error> {
        let all = ["instar", "commit"].iter().chain(args);
        match Cli::try_parse_from(all)?.command {
            Command::Commit(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_of_the_contract() {
        let text = "top -f qcow2 -b base -d -p -q -r 1M -t unsafe --output json --resize-backing --dry-run \
                    --allow-backing-dir a --allow-backing-dir b --plugin-dir c -v";
        let args = commit(&text.split_whitespace().collect::<Vec<_>>()).unwrap();
        assert_eq!((args.rate_limit, args.cache, args.output), (Some(1 << 20), CacheMode::Unsafe, OutputFormat::Json));
        assert!(
            args.keep_overlay && args.progress && args.quiet && args.resize_backing && args.dry_run && args.verbose
        );
        assert_eq!(args.allow_backing_dir, [PathBuf::from("a"), PathBuf::from("b")]);
        for mode in ["none", "writeback", "writethrough", "directsync", "unsafe"] {
            assert_eq!(commit(&["-t", mode, "x"]).unwrap().cache.name(), mode);
        }
        let long = "--format=qcow2 --base=b --progress --quiet --rate-limit=5 --cache=none -- -dash";
        assert_eq!(commit(&long.split_whitespace().collect::<Vec<_>>()).unwrap().filename, PathBuf::from("-dash"));
    }

    #[test]
    fn bad_usage_is_exit_status_2() {
        for args in [&[][..], &["a", "b"], &["-t", "bogus", "a"], &["-r", "abc", "a"], &["-Z", "a"], &["-f"]] {
            assert_eq!(commit(args).unwrap_err().exit_code(), 2, "{args:?}");
        }
    }
}
