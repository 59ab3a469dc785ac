//! `instar info`: options, and what is printed, in the words of `qemu-img info`.

use super::color::ColorArgs;
use super::output::{print, print_json, OutputFormat};
use super::terminal::width;
use super::{info_text, snapshot_text};
use clap::Args;
use instar::error::Error;
use instar::info::{run_info, InfoRequest};
use instar::operation::Session;
use instar::plugins::SearchPath;
use std::io::Write;
use std::path::PathBuf;

/// Show what an image is, without changing it.
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Format of the image. Detected if not given; an image of another format is refused
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// Show the images that it is backed by as well
    #[arg(long)]
    pub backing_chain: bool,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap would take it for help")]
    pub color: ColorArgs,
    /// Accepted for scripts: an image in use can always be shown
    #[arg(short = 'U', long, hide = true)]
    pub force_share: bool,
    /// Also load plugins from DIR; may be given several times
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub filename: PathBuf,
}

/// Run the command.
///
/// # Errors
/// When an image cannot be opened, or its format is not known or not the one that was named.
pub fn run(args: &InfoArgs, session: &Session, out: &mut dyn Write) -> Result<(), Error> {
    snapshot_text::prepare();
    let config = super::configuration(args.output)?;
    let request = InfoRequest {
        image: args.filename.clone(),
        format: args.format.clone(),
        backing_chain: args.backing_chain,
        search: SearchPath::for_process(&args.plugin_dir, &config.plugin_paths()),
        undo_directory: config.undo_path(),
    };
    // A confined process can ask the terminal nothing.
    let paint = args.color.stdout();
    let images = run_info(&request, session)?;
    match (args.output, images.as_slice()) {
        (OutputFormat::Human, images) => {
            let texts: Vec<String> = images.iter().map(|image| info_text::human(image, paint, width())).collect();
            print(out, &texts.join("\n"))
        }
        (OutputFormat::Json, [image]) if !args.backing_chain => print_json(out, image),
        (OutputFormat::Json, images) => print_json(out, images),
    }
}
