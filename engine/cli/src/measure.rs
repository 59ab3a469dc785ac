//! `instar measure`: options, and what is printed, in the words of `qemu-img measure`.

use super::format_options::{help, split_options, want_help};
use super::opening::OpeningArgs;
use super::output::{print, print_json, OutputFormat};
use super::reading;
use super::size::parse_bytes;
use super::unsupported::UnsupportedArgs;
use super::usage::bad_usage;
use clap::Args;
use instar::bytes::Bytes;
use instar::commit::{run_commit, CommitMode, CommitRequest};
use instar::create::create_options;
use instar::error::Error;
use instar::image::SnapshotName;
use instar::measure::{run_measure, Content, MeasureRequest};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

/// Say how long the file of a new image would be; with --commit, how long a commit would make the image below an overlay
#[derive(Args, Debug)]
#[command(override_usage = "instar measure [OPTIONS] <FILENAME>\n       instar measure [OPTIONS] --size <SIZE>")]
pub struct MeasureArgs {
    /// Format of the image. Detected if not given; an image of another format is refused, but raw is believed of any file
    #[arg(short, long, value_name = "FMT", conflicts_with = "size")]
    pub format: Option<String>,
    /// Format of the new image
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw", conflicts_with = "commit")]
    pub target_format: String,
    /// Options of the new image, as NAME=VALUE, separated by commas; may be given several times. `-o help` lists them
    #[arg(short, long, value_name = "OPTIONS", conflicts_with = "commit")]
    pub options: Vec<String>,
    /// Measure the disk of this internal snapshot of the image: its identifier or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT", conflicts_with_all = ["size", "commit"])]
    pub snapshot: Option<SnapshotName>,
    /// Measure a new, empty image with a disk of this size: bytes, or with a suffix k, M, G, T, P or E
    #[arg(short, long, value_name = "SIZE", allow_negative_numbers = true, value_parser = parse_bytes, conflicts_with_all = ["filename", "commit"])]
    pub size: Option<u64>,
    /// Measure what a commit of the image needs of the image that it goes into
    #[arg(long)]
    pub commit: bool,
    /// With --commit: the image of the chain that would be committed into, as for `instar commit -b`
    #[arg(short, long, value_name = "BASE", requires = "commit")]
    pub base: Option<PathBuf>,
    /// With --commit: the format of that image
    #[arg(short = 'F', long, value_name = "FMT", requires = "commit")]
    pub base_format: Option<String>,
    /// With --commit: let a smaller backing grow to the overlay's virtual size
    #[arg(long, requires = "commit")]
    pub resize_backing: bool,
    /// With --commit: merge the overlay's persistent bitmaps into those of the target, as `instar commit --bitmaps` does
    #[arg(long, requires = "commit")]
    pub bitmaps: bool,
    /// With --commit: count the room that `instar commit --atomic` takes besides, and refuse what it would refuse
    #[arg(long, requires = "commit")]
    pub atomic: bool,
    /// With --commit and --atomic: the directory for the undo log of a block device, as for `instar commit --undo-dir`
    #[arg(long, value_name = "DIR", requires = "atomic")]
    pub undo_dir: Option<PathBuf>,
    /// Read the images even if they are in use; a change meanwhile may look like damage
    #[arg(short = 'U', long, conflicts_with = "commit")]
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
    pub unsupported: UnsupportedArgs,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub filename: Option<PathBuf>,
}

impl MeasureArgs {
    /// An option that is only about commits, and is given without one. `requires` does not see it where `-O`, which conflicts with
    /// a commit, is given, too.
    fn without_commit(&self) -> Option<&'static str> {
        let given = [
            (self.base.is_some(), "-b"),
            (self.base_format.is_some(), "-F"),
            (self.resize_backing, "--resize-backing"),
            (self.bitmaps, "--bitmaps"),
            (self.atomic, "--atomic"),
        ];
        given.into_iter().find(|(given, _)| *given && !self.commit).map(|(_, option)| option)
    }
}

/// Run the command.
///
/// # Errors
/// One line that names the file and what to do.
pub fn run(args: &MeasureArgs, out: &mut dyn Write) -> Result<(), Error> {
    args.unsupported.refuse()?;
    let config = super::configuration(args.output)?;
    let settings = args.opening.settings(&config);
    if let Some(option) = args.without_commit() {
        return Err(bad_usage(format!("{option} is about a commit: add --commit")));
    }
    let no_image = || bad_usage("measure needs a FILENAME, or --size SIZE for a new, empty image");
    if args.commit {
        let overlay = args.filename.clone().ok_or_else(no_image)?;
        let request = CommitRequest {
            overlay,
            format: args.format.clone(),
            base: args.base.clone(),
            base_format: args.base_format.clone(),
            mode: CommitMode::Measure,
            resize_backing: args.resize_backing,
            bitmaps: args.bitmaps,
            atomic: args.atomic,
            settings: settings.with_undo_directory(args.undo_dir.as_deref()),
            ..CommitRequest::default()
        };
        let outcome = run_commit(&request, &reading(args.verbose))?;
        let preview = outcome.preview.unwrap_or_default();
        let (length, growth, space) =
            (preview.backing_length_bytes, preview.backing_growth_bytes, preview.backing_space_bytes);
        return match args.output {
            OutputFormat::Human => {
                let lines = [
                    ("required size", Some(length)),
                    ("growth", Some(growth)),
                    ("additional disk space", Some(space)),
                    ("undo log", preview.undo_log_bytes),
                    ("free", preview.free_bytes),
                    ("free for undo log", preview.undo_free_bytes),
                    ("lacking", preview.lacking_bytes),
                ];
                let line = |(name, bytes): (&str, Option<u64>)| Some(format!("{name}: {}\n", Bytes(bytes?)));
                print(out, &lines.into_iter().filter_map(line).collect::<String>())
            }
            OutputFormat::Json => {
                let (target, format) = (outcome.backing.to_string_lossy(), outcome.backing_format);
                let mut measured = json!({
                    "required": length,
                    "growth": growth,
                    "additional-space": space,
                    "free": preview.free_bytes,
                    "target": target,
                    "target-format": format,
                    "sandbox": outcome.sandbox,
                });
                if let Some(keys) = measured.as_object_mut() {
                    outcome.atomic.map(|way| keys.insert("atomic".to_owned(), json!(way)));
                    let known = [
                        ("undo-log", preview.undo_log_bytes),
                        ("undo-free", preview.undo_free_bytes),
                        ("lacking", preview.lacking_bytes),
                    ];
                    keys.extend(known.into_iter().filter_map(|(key, bytes)| Some((key.to_owned(), json!(bytes?)))));
                }
                print_json(out, &measured)
            }
        };
    }
    let options = split_options(&args.options)?;
    if want_help(&options) {
        let (format, options) = create_options(&args.target_format, &settings.search)?;
        return print(out, &help(&format, &options, &[]));
    }
    if options.iter().any(|(name, _)| ["backing_file", "backing_fmt", "size"].contains(&name.as_str())) {
        return Err(bad_usage("the size is that of the image, or of --size, and nothing is measured of a backing file: leave it out of -o"));
    }
    let content = match (args.size, &args.filename) {
        (Some(size), _) => Content::Empty(size),
        (None, Some(path)) => {
            let (path, format, snapshot) = (path.clone(), args.format.clone(), args.snapshot.clone());
            Content::Image { path, format, snapshot, force_share: args.force_share }
        }
        (None, None) => return Err(no_image()),
    };
    let request = MeasureRequest { content, format: args.target_format.clone(), options, settings };
    let outcome = run_measure(&request, &reading(args.verbose))?;
    match args.output {
        OutputFormat::Human => {
            let (required, whole) = (outcome.required, outcome.fully_allocated);
            let bitmaps = outcome.bitmaps.map(|bytes| format!("bitmaps size: {bytes}\n")).unwrap_or_default();
            print(out, &format!("required size: {required}\nfully allocated size: {whole}\n{bitmaps}"))
        }
        OutputFormat::Json => print_json(out, &outcome),
    }
}
