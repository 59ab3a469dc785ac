//! `instar convert`: options, and what is printed.

use super::commit::CacheMode;
use super::format_options::{help, split_options, want_help};
use super::opening::OpeningArgs;
use super::output::{print, print_json, OutputFormat};
use super::progress_args::ProgressArgs;
use super::signals::cancel_on_signals;
use super::size::parse_bytes;
use super::told::Told;
use super::unsupported::UnsupportedArgs;
use super::usage::bad_usage;
use clap::Args;
use instar::convert::{run_convert, ConvertRequest};
use instar::create::create_options;
use instar::error::Error;
use instar::image::SnapshotName;
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;

/// Make a new image of the disk that an image shows, with everything below it
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// Format of the image that is read. Detected if not given; raw is believed of any file
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Format of the new image
    #[arg(short = 'O', long = "target-format", value_name = "FMT", default_value = "raw")]
    pub target_format: String,
    /// Options of that format, as NAME=VALUE, separated by commas; may be given several times. `-o help` lists them
    #[arg(short, long, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Read this internal snapshot: its ID or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<SnapshotName>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub progress: ProgressArgs,
    /// Print no warnings and no progress
    #[arg(short, long)]
    pub quiet: bool,
    /// Limit how many bytes move per second; a suffix k, M or G multiplies by powers of 1024, 0 is no limit
    #[arg(short, long, alias = "rate", value_name = "BYTES/S", value_parser = parse_bytes)]
    pub rate_limit: Option<u64>,
    /// Choose what writes to the new image promise; unsafe flushes nothing
    #[arg(short = 't', long = "cache", value_enum, default_value_t, value_name = "MODE")]
    pub cache: CacheMode,
    /// Read the image even if it is in use; the copy may be of no moment that ever was
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub opening: OpeningArgs,
    /// Print what was loaded, how the process is confined, and what the guest logs
    #[arg(short, long)]
    pub verbose: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub others: OtherArgs,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub unsupported: UnsupportedArgs,
    /// The image that is read, and the new one, which replaces a file of that name once it is complete
    #[arg(value_name = "FILENAME", required_unless_present = "options")]
    pub files: Vec<PathBuf>,
}

/// Options of `qemu-img convert` that change nothing here, or that get a sentence.
#[derive(Args, Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "options")]
pub struct OtherArgs {
    /// Taken for the sake of scripts: how many requests are under way is the host's to choose
    #[arg(short = 'm', long, hide = true, value_name = "N")]
    pub parallel: Option<u32>,
    /// Taken for the sake of scripts
    #[arg(short = 'W', hide = true)]
    pub out_of_order: bool,
    /// Taken for the sake of scripts: the host copies as fast as it can
    #[arg(short = 'C', hide = true)]
    pub copy_offloading: bool,
    /// Taken for the sake of scripts: how the source is read
    #[arg(short = 'T', hide = true, value_enum, value_name = "MODE")]
    pub source_cache: Option<CacheMode>,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(short = 'c', hide = true)]
    pub compress: bool,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(short = 'n', hide = true)]
    pub no_create: bool,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(short = 'B', hide = true, value_name = "BACKING")]
    pub backing: Option<String>,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(short = 'F', hide = true, value_name = "FMT")]
    pub backing_format: Option<String>,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(short = 'S', hide = true, value_name = "SIZE")]
    pub sparse: Option<String>,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(long, hide = true)]
    pub target_is_zero: bool,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(long, hide = true)]
    pub salvage: bool,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(long, hide = true)]
    pub bitmaps: bool,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(long, hide = true)]
    pub skip_broken_bitmaps: bool,
    /// An option of `qemu-img`, for a sentence about it
    #[arg(long, hide = true)]
    pub target_image_opts: bool,
}

impl OtherArgs {
    /// Refuse those that would mean something.
    fn refuse(&self) -> Result<(), Error> {
        let sentences = [
            (self.compress, "-c is not supported: the new image is not compressed; leave it out"),
            (self.no_create || self.target_is_zero, "-n is not supported: the target is always a new image; leave it out"),
            (
                self.backing.is_some() || self.backing_format.is_some(),
                "-B is not supported: the new image holds the whole disk, and has no backing file; leave it out",
            ),
            (
                self.sparse.is_some(),
                "-S is not supported: what the source says is zero stays out of the new image, and its data is copied as it is; \
                 leave it out",
            ),
            (self.salvage, "--salvage is not supported: a source that cannot be read makes no image"),
            (
                self.bitmaps || self.skip_broken_bitmaps,
                "--bitmaps is not supported: the new image has no bitmaps; leave it out",
            ),
            (self.target_image_opts, "--target-image-opts is not supported: name the target by its file name"),
        ];
        match sentences.into_iter().find(|(given, _)| *given) {
            Some((_, sentence)) => Err(bad_usage(sentence)),
            None => Ok(()),
        }
    }
}

/// Run the command.
///
/// # Errors
/// One line that names the file and what to do. At the target's name stands what stood there before.
pub fn run(args: &ConvertArgs, out: &mut dyn Write) -> Result<(), Error> {
    args.unsupported.refuse()?;
    args.others.refuse()?;
    let config = super::configuration(args.output)?;
    let settings = args.opening.settings(&config);
    let options = split_options(&args.options)?;
    if want_help(&options) {
        let (format, options) = create_options(&args.target_format, &settings.search)?;
        return print(out, &help(&format, &options, &[]));
    }
    if options.iter().any(|(name, _)| ["backing_file", "backing_fmt", "size"].contains(&name.as_str())) {
        return Err(bad_usage(
            "the size is that of the source, and the new image has no backing file: leave it out of -o",
        ));
    }
    let [source, target] = args.files.as_slice() else {
        return Err(bad_usage("convert takes one image to read, and the new one: FILENAME OUTPUT"));
    };
    let request = ConvertRequest {
        source: source.clone(),
        format: args.format.clone(),
        snapshot: args.snapshot.clone(),
        force_share: args.force_share,
        target: target.clone(),
        target_format: args.target_format.clone(),
        options,
        rate_limit: args.rate_limit.unwrap_or(0),
        cache: args.cache.into(),
        settings,
    };
    let warns = !args.quiet && args.output == OutputFormat::Human;
    let told = Rc::new(Told { verbose: args.verbose, warns, ..Told::of("convert", &args.progress, args.quiet)? });
    let result = run_convert(&request, &told.session(cancel_on_signals()));
    told.end(false, result.as_ref());
    let outcome = result?;
    match args.output {
        OutputFormat::Human => Ok(()),
        OutputFormat::Json => print_json(out, &outcome),
    }
}
