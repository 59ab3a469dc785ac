//! `instar map`: options, in the words of `qemu-img map`.

use super::color::ColorArgs;
use super::map_picture::{Drawing, MapPicture};
use super::map_text::MapText;
use super::opening::OpeningArgs;
use super::output::{started_in, OutputFormat};
use super::reading;
use super::size::parse_bytes;
use super::terminal::width;
use clap::Args;
use instar::error::Error;
use instar::map::{run_map, MapRequest, MapRun};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Show which layer of a chain holds which bytes of the virtual disk, and where
#[derive(Args, Debug)]
pub struct MapArgs {
    /// Format of the image. Detected if not given; an image of another format is refused
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// How to print the result; for people, only data is listed
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub color: ColorArgs,
    /// Draw a strip of the disk for each layer, which shows where what is read comes from; `--picture=svg` for a page
    #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "text",
          conflicts_with = "output")]
    pub picture: Option<Drawing>,
    /// Begin at this byte of the virtual disk
    #[arg(short, long, value_name = "OFFSET", allow_negative_numbers = true, value_parser = parse_bytes, default_value = "0", hide_default_value = true)]
    pub start_offset: u64,
    /// Map this many bytes at most
    #[arg(short = 'l', long, value_name = "LENGTH", allow_negative_numbers = true, value_parser = parse_bytes)]
    pub max_length: Option<u64>,
    /// Read the images even if they are in use; a change meanwhile may look like damage
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub opening: OpeningArgs,
    /// Print what was loaded, how the process is confined, and what the guest logs
    #[arg(short, long)]
    pub verbose: bool,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub filename: PathBuf,
}

/// Run the command.
///
/// # Errors
/// One line that names the file and what to do.
pub fn run(args: &MapArgs, out: &mut dyn Write) -> Result<(), Error> {
    let config = super::configuration(args.output)?;
    let started_in = started_in().filter(|_| args.filename.is_relative());
    // A confined process can ask the terminal nothing.
    let paint = args.color.stdout();
    let request = MapRequest {
        image: args.filename.clone(),
        format: args.format.clone(),
        force_share: args.force_share,
        range: args.start_offset..args.max_length.map_or(u64::MAX, |length| args.start_offset.saturating_add(length)),
        settings: args.opening.settings(&config),
    };
    if let Some(drawing) = args.picture {
        let mut picture = MapPicture::new(drawing, args.start_offset, paint, width());
        run_map(&request, &reading(args.verbose), &mut |run| {
            picture.add(&shown(run, started_in));
            Ok(())
        })?;
        return picture.end(out);
    }
    let mut text = MapText::new(out, args.output, paint);
    run_map(&request, &reading(args.verbose), &mut |run| text.print(&shown(run, started_in)))?;
    text.end()
}

/// A run whose paths begin where the image's own name does, as `qemu-img map` shows them: an image that was named from the working
/// directory on has backings that are.
fn shown<'r>(run: &MapRun<'r>, started_in: Option<&Path>) -> MapRun<'r> {
    let near = |path: &'r Path| started_in.and_then(|directory| path.strip_prefix(directory).ok()).unwrap_or(path);
    MapRun { file: run.file.map(near), layer: near(run.layer), ..*run }
}
