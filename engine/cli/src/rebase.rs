//! `instar rebase`: options, and what is printed.

use super::cache_mode::CacheMode;
use super::opening::OpeningArgs;
use super::output::{print_json, unprinted_but, OutputFormat};
use super::paragraph::print_sentences;
use super::progress_args::ProgressArgs;
use super::signals::cancel_on_signals;
use super::told::Told;
use super::unsupported::UnsupportedArgs;
use super::usage::bad_usage;
use clap::Args;
use instar::bytes::Bytes;
use instar::config::Config;
use instar::error::Error;
use instar::escape::{escape, escape_path};
use instar::rebase::{run_rebase, RebaseOutcome, RebaseRequest};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Put another image below an overlay, or none, and keep what it reads
#[derive(Args, Debug)]
pub struct RebaseArgs {
    /// Format of the image. Detected if not given; an image of another format is refused
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// The new backing file, recorded as given: a relative name starts at the image's directory. With '', the image has
    /// no backing file, and holds everything itself
    #[arg(short, long, value_name = "BACKING")]
    pub backing: String,
    /// Format of the new backing file, which is recorded, and believed (raw above all)
    #[arg(short = 'F', long, value_name = "FMT")]
    pub backing_format: Option<String>,
    /// Change only what the image records, and compare nothing: for a backing file that was moved, or is known to hold the same
    #[arg(short = 'u', long)]
    pub backing_unsafe: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub progress: ProgressArgs,
    /// Print nothing on success
    #[arg(short, long)]
    pub quiet: bool,
    /// Choose what writes promise
    #[arg(short = 't', long = "cache", value_enum, default_value_t, value_name = "MODE")]
    pub cache: CacheMode,
    /// Accepted for scripts: rebase writes to no backing file
    #[arg(short = 'T', long, hide = true, value_enum, value_name = "MODE")]
    pub backing_cache: Option<CacheMode>,
    /// Refused with an explanation
    #[arg(short = 'U', long, hide = true)]
    pub force_share: bool,
    /// Refused with an explanation
    #[arg(short, long, hide = true)]
    pub compress: bool,
    /// Report how much would be written, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub opening: OpeningArgs,
    /// Print what was loaded, resolved and measured
    #[arg(short, long)]
    pub verbose: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub unsupported: UnsupportedArgs,
    /// The image. With several, none is changed before all of them can be
    #[arg(value_name = "FILENAME", required = true, num_args = 1..)]
    pub filenames: Vec<PathBuf>,
}

/// Name and format of the new backing file.
fn backing(args: &RebaseArgs) -> Result<Option<(String, String)>, Error> {
    match (args.backing.as_str(), &args.backing_format) {
        ("", None) => Ok(None),
        ("", Some(_)) => {
            Err(bad_usage("a format for no backing file makes no sense: leave out -F, or name a file with -b"))
        }
        (_, None) => Err(bad_usage("the format of the backing image is needed: add -F FMT")),
        (name, Some(format)) => Ok(Some((name.to_owned(), format.clone()))),
    }
}

/// Refuse options of `qemu-img` that have no place here.
pub(super) fn refuse_unsupported(args: &RebaseArgs) -> Result<(), Error> {
    args.unsupported.refuse()?;
    if args.compress {
        return Err(bad_usage(
            "-c is not supported: rebase without it, and the data that is written is not compressed",
        ));
    }
    if args.force_share {
        return Err(bad_usage(
            "-U is not supported: an image that another process uses must not be changed; stop that first",
        ));
    }
    Ok(())
}

/// Rebase one image, and print what came of it.
pub(super) fn rebase_one(args: &RebaseArgs, image: &Path, out: &mut dyn Write) -> Result<(), Error> {
    let told = Rc::new(told(args)?);
    let result = rebased(args, image, &told);
    told.end(args.dry_run, result.as_ref());
    let outcome = result?;
    let printed = match args.output {
        OutputFormat::Json => print_json(out, &outcome),
        OutputFormat::Human if args.quiet && !args.dry_run => Ok(()),
        OutputFormat::Human => print_sentences(out, &text(&outcome)),
    };
    let done = if args.dry_run { "nothing was changed" } else { "the rebase is done" };
    printed.map_err(|error| unprinted_but(done, &outcome.image_given, &error))
}

/// Who is told what happens.
pub(super) fn told(args: &RebaseArgs) -> Result<Told, Error> {
    let warns = !args.quiet && args.output == OutputFormat::Human;
    Ok(Told { verbose: args.verbose, warns, ..Told::of("rebase", &args.progress, args.quiet)? })
}

/// What is asked for, for one image.
pub(super) fn request(args: &RebaseArgs, image: &Path, config: &Config) -> Result<RebaseRequest, Error> {
    Ok(RebaseRequest {
        image: image.to_owned(),
        format: args.format.clone(),
        backing: backing(args)?,
        unsafe_mode: args.backing_unsafe,
        dry_run: args.dry_run,
        cache: args.cache.into(),
        settings: args.opening.settings(config),
    })
}

fn rebased(args: &RebaseArgs, image: &Path, told: &Rc<Told>) -> Result<RebaseOutcome, Error> {
    let config = super::configuration(args.output)?;
    let request = request(args, image, &config)?;
    let mut outcome = run_rebase(&request, &told.session(cancel_on_signals()))?;
    outcome.warnings.splice(0..0, config.warnings);
    Ok(outcome)
}

/// The result as text.
pub(super) fn text(outcome: &RebaseOutcome) -> String {
    let (image, bytes, clusters) =
        (escape_path(&outcome.image_given), Bytes(outcome.bytes_written), outcome.clusters_written);
    let onto = match &outcome.backing {
        Some(name) => format!("onto '{}'", escape(name)),
        None => "onto no backing file".to_owned(),
    };
    let plural = if clusters == 1 { "" } else { "s" };
    if outcome.dry_run {
        return format!(
            "Would rebase '{image}' {onto}, and write {bytes} in {clusters} cluster{plural}. Nothing was changed.\n"
        );
    }
    let written = if outcome.bytes_written > 0 {
        format!(" {bytes} in {clusters} cluster{plural} were written into it.")
    } else {
        String::new()
    };
    format!("Image rebased {onto}.{written}\n")
}
