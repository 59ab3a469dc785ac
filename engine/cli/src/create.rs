//! `instar create`: options, and what is printed.

use super::format_options::{help, split_options, want_help};
use super::output::{print, unprinted_but, OutputFormat};
use super::size::parse_bytes;
use super::usage::bad_usage;
use clap::Args;
use instar::create::{create_options, run_create, CreateRequest, Created};
use instar::error::Error;
use instar::escape::{escape, escape_path};
use instar::plugins::SearchPath;
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;

/// Make a new, empty image. A file of that name is overwritten, unless another process uses it or --no-clobber is given
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Format of the new image
    #[arg(short, long, value_name = "FMT", default_value = "raw")]
    pub format: String,
    /// Image below the new one; a relative name starts at the new image's directory
    #[arg(short, long, value_name = "BASE")]
    pub backing: Option<String>,
    /// Format of the backing image; needed with -b
    #[arg(short = 'F', long, value_name = "FMT")]
    pub backing_format: Option<String>,
    /// Do not look at the backing image; SIZE is needed then
    #[arg(short = 'u', long)]
    pub backing_unsafe: bool,
    /// Options of the format, as NAME=VALUE, separated by commas; may be given several times. `-o help` lists them
    #[arg(short, long, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Refuse to overwrite a file or device that exists
    #[arg(long)]
    pub no_clobber: bool,
    /// Print nothing on success
    #[arg(short, long)]
    pub quiet: bool,
    /// Also load plugins from DIR; may be given several times
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
    /// The new image
    #[arg(value_name = "FILENAME", required_unless_present = "options")]
    pub filename: Option<PathBuf>,
    /// Virtual size in bytes, or with a suffix k, M, G, T, P or E. That of the backing image if not given
    #[arg(value_name = "SIZE", allow_negative_numbers = true)]
    pub size: Option<String>,
}

/// Options that are the same for all formats.
const COMMON: &[(&str, &str)] = &[
    ("size", "virtual size"),
    ("backing_file", "image that the new one is backed by"),
    ("backing_fmt", "format of the backing image"),
];

/// What is wanted, from all the ways of saying it.
struct Wanted {
    size: Option<u64>,
    backing: Option<String>,
    backing_format: Option<String>,
    options: Vec<(String, String)>,
}

/// Run the command.
///
/// # Errors
/// When the format, an option or the backing image is refused, or the file cannot be written. Nothing is changed
/// unless everything but the writing has succeeded.
pub fn run(args: &CreateArgs, out: &mut dyn Write) -> Result<(), Error> {
    let config = super::configuration(OutputFormat::Human)?;
    let search = SearchPath::for_process(&args.plugin_dir, &config.plugin_paths());
    let pairs = split_options(&args.options)?;
    if want_help(&pairs) {
        let (format, options) = create_options(&args.format, &search)?;
        return print(out, &help(&format, &options, COMMON));
    }
    let image = args.filename.clone().ok_or_else(|| bad_usage("create needs a FILENAME"))?;
    let Wanted { size, backing, backing_format, options } = wanted(args, pairs)?;
    let request = CreateRequest {
        image,
        format: args.format.clone(),
        size,
        backing,
        backing_format,
        backing_unsafe: args.backing_unsafe,
        options,
        no_clobber: args.no_clobber,
        search,
        undo_directory: config.undo_path(),
    };
    let created = run_create(&request)?;
    if args.quiet {
        return Ok(());
    }
    // Not before: what is said to be formatted is not refused any more.
    print(out, &announcement(&request, &created))
        .map_err(|error| unprinted_but("the image is made", &request.image, &error))
}

/// Size and backing can be options, too.
fn wanted(args: &CreateArgs, pairs: Vec<(String, String)>) -> Result<Wanted, Error> {
    let mut wanted = Wanted {
        size: None,
        backing: args.backing.clone(),
        backing_format: args.backing_format.clone(),
        options: Vec::new(),
    };
    let mut size = args.size.clone();
    for (name, value) in pairs {
        let slot = match name.as_str() {
            "size" => &mut size,
            "backing_file" => &mut wanted.backing,
            "backing_fmt" => &mut wanted.backing_format,
            _ => {
                wanted.options.push((name, value));
                continue;
            }
        };
        if slot.is_some() {
            return Err(bad_usage(format!("{name} is given twice")));
        }
        *slot = Some(value);
    }
    if let Some(text) = size {
        let bytes = parse_bytes(&text).map_err(|why| bad_usage(format!("the size '{}' is {why}", escape(&text))))?;
        wanted.size = Some(bytes);
    }
    Ok(wanted)
}

fn announcement(request: &CreateRequest, created: &Created) -> String {
    let Created { format, virtual_size } = created;
    let mut text = format!("Formatting '{}', fmt={format} size={virtual_size}", escape_path(&request.image));
    if let Some(backing) = &request.backing {
        let _ = write!(text, " backing_file={}", escape(backing));
    }
    if let Some(format) = &request.backing_format {
        let _ = write!(text, " backing_fmt={}", escape(format));
    }
    for (name, value) in &request.options {
        let _ = write!(text, " {}={}", escape(name), escape(value));
    }
    text.push('\n');
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_as_qemu_img_splits_them() {
        let pairs = split_options(&["a=b,c=d,,e=f".to_owned(), "g=".to_owned()]).unwrap();
        let expected = [("a", "b"), ("c", "d,e=f"), ("g", "")];
        assert_eq!(pairs, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert!(split_options(&["alone".to_owned()]).is_err());
        assert_eq!(split_options(&["help".to_owned()]).unwrap()[0].0, "help");
    }
}
