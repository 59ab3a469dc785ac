//! The options of `instar commit`.

use super::cache_mode::CacheMode;
use super::opening::OpeningArgs;
use super::output::OutputFormat;
use super::progress_args::ProgressArgs;
use super::size::parse_bytes;
use super::unsupported::UnsupportedArgs;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// Merge a copy-on-write overlay into the image below it, and empty the overlay
#[derive(Args, Debug)]
pub struct CommitArgs {
    /// Format of the overlay. Detected if not given; an image of another format is refused
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Commit into this image of the overlay's backing chain instead of its parent; where the overlay's format records no parent,
    /// this names it. A relative name starts at the overlay's directory.
    /// Without it, the overlay chooses: a file in its directory tree, neither hidden nor executable
    #[arg(short, long, value_name = "BASE")]
    pub base: Option<PathBuf>,
    /// Format of the image to commit into, which is believed (raw above all). Default: as recorded, else detected, never raw
    #[arg(short = 'F', long, value_name = "FMT")]
    pub base_format: Option<String>,
    /// Keep the overlay's content. (No file is removed; the long name is qemu-img's)
    #[arg(short = 'd', long = "drop")]
    pub keep_overlay: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub progress: ProgressArgs,
    /// Print nothing on success
    #[arg(short, long)]
    pub quiet: bool,
    /// Limit how many bytes move per second; a suffix k, M or G multiplies by powers of 1024, 0 is no limit
    #[arg(short, long, alias = "rate", value_name = "BYTES/S", allow_negative_numbers = true, value_parser = parse_bytes)]
    pub rate_limit: Option<u64>,
    /// Choose what writes promise
    #[arg(short = 't', long = "cache", value_enum, default_value_t, value_name = "MODE")]
    pub cache: CacheMode,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    /// Change the image that is committed into whole or not at all: after a crash at any instant it is what it was, or what it
    /// should be. A clone takes its place where the file system shares extents; elsewhere an undo log is kept beside it, which
    /// `instar recover` applies after a crash
    #[arg(long)]
    pub atomic: bool,
    /// Keep what that image was under NAME in its directory
    #[arg(long, value_name = "NAME", requires = "atomic")]
    pub keep_backup: Option<PathBuf>,
    /// The directory for the undo log of a block device, beside which none can lie; not one that a restart empties
    #[arg(long, value_name = "DIR", requires = "atomic")]
    pub undo_dir: Option<PathBuf>,
    /// Let a smaller backing grow to the overlay's virtual size
    #[arg(long)]
    pub resize_backing: bool,
    /// Merge the persistent bitmaps of what is committed into those of the image that it is committed into; one that is missing
    /// there is made. What is not merged is named
    #[arg(long)]
    pub bitmaps: bool,
    /// Have CHILD, an image above the overlay, name the image that is committed into instead, so that the overlay can be removed;
    /// may be given several times
    #[arg(long, value_name = "CHILD")]
    pub relink: Vec<PathBuf>,
    /// The same for every image in DIR that the overlay is the backing file of, but not in the directories below it; may be given
    /// several times
    #[arg(long, value_name = "DIR")]
    pub relink_in: Vec<PathBuf>,
    /// Commit although other images have the same backing, which damages them
    #[arg(long)]
    pub ignore_siblings: bool,
    /// Overwrite with zeroes, durably, what the overlay gives back, before it is given back
    #[arg(long, conflicts_with = "keep_overlay")]
    pub wipe: bool,
    /// Read back what was written, past the page cache, and compare it with the overlay before that is changed
    #[arg(long)]
    pub verify: bool,
    /// Print the SHA-256 of the disk as the overlay's guest sees it, read all of it again from the image that it was committed into,
    /// and fail if that is another one
    #[arg(long)]
    pub digest: bool,
    /// Look for zeroes in the data that is committed, which takes one more read of it, and commit them as zeroes, which take no
    /// space where the image can say so
    #[arg(long, value_enum, value_name = "MODE", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub detect_zeroes: Option<DetectZeroes>,
    /// Remove the overlay's file once everything is durable in the image that it was committed into, instead of emptying it
    #[arg(long, conflicts_with = "keep_overlay")]
    pub delete_overlay: bool,
    /// Write what only the image named with -b, or a layer above it, holds into the overlay, and give the overlay's file that
    /// image's name: less work where the overlay holds most of what is read. The overlay's own name is gone afterwards
    #[arg(
        long,
        requires = "base",
        conflicts_with_all = [
            "keep_overlay", "rate_limit", "atomic", "keep_backup", "bitmaps", "relink", "relink_in", "wipe", "verify", "digest",
            "detect_zeroes", "delete_overlay"
        ]
    )]
    pub by_adoption: bool,
    /// Say what would be committed, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub opening: OpeningArgs,
    /// Print what was loaded, resolved and measured
    #[arg(short, long)]
    pub verbose: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub unsupported: UnsupportedArgs,
    /// The overlay
    #[arg(value_name = "FILENAME")]
    pub filename: PathBuf,
}

/// What becomes of data that is all zeroes, with QEMU's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DetectZeroes {
    /// It is data (default)
    #[default]
    Off,
    /// It is committed as zeroes
    On,
    /// The same: zeroes give their space back in any case
    Unmap,
}
