//! `instar convert`: options, and what is printed.

use super::cache_mode::CacheMode;
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
    /// Format of the source. Detected if not given; raw is believed of any file
    #[arg(short, long, alias = "source-format", value_name = "FMT")]
    pub format: Option<String>,
    /// Format of the new image
    #[arg(short = 'O', long = "target-format", value_name = "FMT", default_value = "raw")]
    pub target_format: String,
    /// Options of that format, as NAME=VALUE, separated by commas; may be given several times. `-o help` lists them
    #[arg(short, long, alias = "target-options", value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Record this backing file in the new image, which then holds only the data of the layers above it
    #[arg(short = 'B', long = "backing", value_name = "BACKING")]
    pub backing: Option<String>,
    /// Format of that backing file
    #[arg(short = 'F', long, value_name = "FMT")]
    pub backing_format: Option<String>,
    /// Write into an existing image or block device, in place; a failure leaves a part of the disk in it
    #[arg(short = 'n', long)]
    pub no_create: bool,
    /// With -n: the target already reads as zeroes, so write none
    #[arg(long)]
    pub target_is_zero: bool,
    /// Compress the data of the new image: qcow2 (also -o compression_type=zstd), or vmdk with -o
    /// subformat=streamOptimized
    #[arg(short = 'c', long)]
    pub compress: bool,
    /// Search data for zeroes, and leave out runs of at least this many bytes; with 0, the new image takes space for
    /// all of its disk
    #[arg(short = 'S', long = "sparse-size", value_name = "SIZE", allow_negative_numbers = true, value_parser = parse_bytes)]
    pub sparse: Option<u64>,
    /// Copy the persistent bitmaps of the source
    #[arg(long)]
    pub bitmaps: bool,
    /// With --bitmaps: leave out bitmaps that were not saved when the image was closed
    #[arg(long)]
    pub skip_broken_bitmaps: bool,
    /// Copy zeroes for data that cannot be read or decoded, with a warning for each range, instead of failing
    #[arg(long)]
    pub salvage: bool,
    /// Read this internal snapshot: its ID or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, alias = "source-snapshot", value_name = "SNAPSHOT")]
    pub snapshot: Option<SnapshotName>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub progress: ProgressArgs,
    /// Print no warnings and no progress
    #[arg(short, long)]
    pub quiet: bool,
    /// Limit how many bytes move per second; a suffix k, M or G multiplies by powers of 1024, 0 is no limit
    #[arg(short, long, alias = "rate", value_name = "BYTES/S", allow_negative_numbers = true, value_parser = parse_bytes)]
    pub rate_limit: Option<u64>,
    /// Choose what writes to the new image promise; unsafe flushes nothing
    #[arg(short = 't', long = "cache", alias = "target-cache", value_enum, default_value_t, value_name = "MODE")]
    pub cache: CacheMode,
    /// Read the image even if it is in use; the copy may mix states of different moments
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
    /// The sources, whose disks follow each other, and the new image, which replaces a file of that name once it is
    /// complete
    #[arg(value_name = "FILENAME", required_unless_present = "options")]
    pub files: Vec<PathBuf>,
}

/// Options of `qemu-img convert` that have no effect here, or that are refused with an explanation.
#[derive(Args, Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "options")]
pub struct OtherArgs {
    /// How many processors the guest may use at most
    #[arg(short = 'm', long, hide = true, value_name = "N")]
    pub parallel: Option<u32>,
    /// Accepted for scripts
    #[arg(short = 'W', long = "oob-writes", hide = true)]
    pub out_of_order: bool,
    /// Accepted for scripts: the host always copies as fast as it can
    #[arg(short = 'C', long = "copy-range-offloading", hide = true)]
    pub copy_offloading: bool,
    /// Accepted for scripts: how the source is read
    #[arg(short = 'T', long = "source-cache", hide = true, value_enum, value_name = "MODE")]
    pub source_cache: Option<CacheMode>,
    /// An option of `qemu-img`, refused with an explanation
    #[arg(long, hide = true)]
    pub target_image_opts: bool,
    /// An option of `qemu-img`, refused with an explanation
    #[arg(long, hide = true)]
    pub source_image_opts: bool,
}

impl OtherArgs {
    /// Refuse the options that would change the result.
    fn refuse(&self) -> Result<(), Error> {
        let sentences = [
            (
                self.source_image_opts,
                "--source-image-opts is not supported: name the image by its file name, and its format with -f",
            ),
            (self.target_image_opts, "--target-image-opts is not supported: name the target by its file name"),
        ];
        match sentences.into_iter().find(|(given, _)| *given) {
            Some((_, sentence)) => Err(bad_usage(sentence)),
            None => Ok(()),
        }
    }
}

/// The unit of sizes for `-S`, as in `qemu-img`: multiples of this many bytes …
const SPARSE_UNIT: u64 = 512;
/// … up to this one.
const SPARSE_MOST: u64 = 16 << 20;

impl ConvertArgs {
    /// Refuse options that contradict each other.
    fn check(&self, sources: usize, options: &[(String, String)]) -> Result<(), Error> {
        let preallocates = options.iter().any(|(name, value)| name == "preallocation" && value != "off");
        let sparse = self.sparse.unwrap_or(SPARSE_UNIT);
        let sentences = [
            (
                self.backing.is_some() && self.backing_format.is_none(),
                "the format of the backing file is needed: add -F FMT",
            ),
            (
                self.backing.is_none() && self.backing_format.is_some(),
                "-F is the format of a backing file: add -B BACKING",
            ),
            (
                self.backing.is_some() && sources > 1,
                "several images have no backing file in common: leave out -B, or convert one image",
            ),
            (self.snapshot.is_some() && sources > 1, "-l reads a snapshot of one image: convert one image"),
            (self.bitmaps && sources > 1, "--bitmaps takes those of one image: convert one image"),
            (self.no_create && self.backing.is_some(), "-n leaves the target's backing file as it is: leave out -B"),
            (self.no_create && !self.options.is_empty(), "-n creates no image, and -o changes nothing: leave it out"),
            (self.target_is_zero && !self.no_create, "--target-is-zero is about a target that is there: add -n"),
            (self.skip_broken_bitmaps && !self.bitmaps, "--skip-broken-bitmaps is about bitmaps: add --bitmaps"),
            (
                self.sparse == Some(0) && self.backing.is_some(),
                "-S 0 takes space for the whole disk, and -B leaves most of it to the backing file: choose one of them",
            ),
            (
                self.compress && preallocates,
                "-c makes clusters small, and -o preallocation=... makes room for large ones: choose one of them",
            ),
            (
                sparse > SPARSE_MOST || !sparse.is_multiple_of(SPARSE_UNIT),
                "-S takes a multiple of 512 bytes up to 16777216, or 0 to take space for the whole disk",
            ),
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
/// One line that names the file and what to do. The file at the target's name is unchanged.
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
        return Err(bad_usage("the size is that of the source, and -B names the backing file: leave it out of -o"));
    }
    let [source, others @ .., target] = args.files.as_slice() else {
        return Err(bad_usage("convert takes an image to read, and the new one: FILENAME OUTPUT"));
    };
    args.check(1 + others.len(), &options)?;
    if target.as_os_str() == "-" {
        return Err(bad_usage(
            "'-' is not standard output: the parts of an image are not written in their order; name a file (./- if it is called so)",
        ));
    }
    let request = ConvertRequest {
        source: source.clone(),
        others: others.to_vec(),
        backing: args.backing.clone().zip(args.backing_format.clone()),
        in_place: args.no_create,
        target_is_zero: args.target_is_zero,
        compress: args.compress,
        sparse: args.sparse.unwrap_or(0),
        // What is zero takes no space in a compressed image.
        allocate: args.sparse == Some(0) && !args.compress,
        bitmaps: args.bitmaps,
        skip_broken_bitmaps: args.skip_broken_bitmaps,
        salvage: args.salvage,
        format: args.format.clone(),
        snapshot: args.snapshot.clone(),
        force_share: args.force_share,
        target: target.clone(),
        target_format: args.target_format.clone(),
        options,
        rate_limit: args.rate_limit.unwrap_or(0),
        processors: args.others.parallel.map(|count| usize::try_from(count).unwrap_or(usize::MAX)),
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
