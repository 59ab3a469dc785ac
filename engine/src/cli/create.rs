//! `instar create`: a new, empty image.

use super::create_file;
use super::output::{print, unprinted_but, OutputFormat};
use super::size::parse_size;
use crate::confine::Confinement;
use crate::error::{Error, Role};
use crate::escape::{escape, escape_path, printable};
use crate::image::{file_name, Access, Gate, NamedFile, OpenedFile, Part, Recorder};
use crate::plugins::{Plugin, Registry, SearchPath};
use clap::Args;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::std_types::{ROption, RString, RVec, Tuple2};
use instar_plugin_api::{BackingPointer, CreateSpec, ImageFacts};
use std::fmt::Write as _;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
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
    #[arg(value_name = "SIZE")]
    pub size: Option<String>,
}

/// What is wanted, from all the ways of saying it.
struct Wanted {
    size: Option<u64>,
    backing: Option<String>,
    backing_format: Option<String>,
    options: Vec<(String, String)>,
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::BadUsage, message)
}

/// Run the command.
///
/// # Errors
/// When the format, an option or the backing image is refused, or the file cannot be written. Nothing is changed
/// unless everything but the writing has succeeded.
pub fn run(args: &CreateArgs, out: &mut dyn Write) -> Result<(), Error> {
    let registry = Registry::load(&SearchPath::for_process(
        &args.plugin_dir,
        &super::configuration(OutputFormat::Human)?.plugin_paths(),
    ));
    Error::if_refused(&registry)?;
    let plugin = registry.by_format(&args.format).ok_or_else(|| {
        let message =
            format!("unknown format '{}': no plugin for it is loaded (see `instar plugins`)", escape(&args.format));
        Error::new(ErrorCode::PluginUnavailable, message)
    })?;
    let pairs = split_options(&args.options)?;
    if pairs.iter().any(|(name, _)| name == "help" || name == "?") {
        return print(out, &help(plugin));
    }
    let filename = args.filename.as_deref().ok_or_else(|| usage("create needs a FILENAME"))?;
    let wanted = wanted(args, pairs)?;
    let file = NamedFile::new(filename);
    let (virtual_size, backing, backing_facts) = resolve(args, &file, &wanted, &registry)?;

    let options: RVec<_> =
        wanted.options.iter().map(|(k, v)| Tuple2(RString::from(k.as_str()), RString::from(v.as_str()))).collect();
    let file_name = filename.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default().into();
    let spec = CreateSpec { virtual_size, file_name, backing, backing_facts, options };
    let image = plugin.create(&spec).map_err(|failure| Error::plugin(filename, &failure))?;
    create_file::write(&file, &image, args.no_clobber)?;
    if args.quiet {
        return Ok(());
    }
    // Not before: what is said to be formatted is not refused any more.
    print(out, &announcement(filename, plugin, virtual_size, &wanted))
        .map_err(|error| unprinted_but("the image is made", filename, &error))
}

/// `a=b,c=d` with `,,` for a comma within a value, as `qemu-img` reads it.
fn split_options(texts: &[String]) -> Result<Vec<(String, String)>, Error> {
    let mut pairs = Vec::new();
    for text in texts {
        let mut items = vec![String::new()];
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            if c == ',' && chars.next_if_eq(&',').is_none() {
                items.push(String::new());
            } else if let Some(item) = items.last_mut() {
                item.push(c);
            }
        }
        for item in items.into_iter().filter(|item| !item.is_empty()) {
            match item.split_once('=') {
                Some((name, value)) => pairs.push((name.to_owned(), value.to_owned())),
                None if item == "help" || item == "?" => pairs.push((item, String::new())),
                None => return Err(usage(format!("option '{}' needs a value: NAME=VALUE", escape(&item)))),
            }
        }
    }
    Ok(pairs)
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
            return Err(usage(format!("{name} is given twice")));
        }
        *slot = Some(value);
    }
    if let Some(text) = size {
        let bytes = parse_size(&text).ok_or_else(|| {
            usage(format!("'{}' is not a size: use digits and a suffix k, M, G, T, P or E", escape(&text)))
        })?;
        wanted.size = Some(bytes);
    }
    Ok(wanted)
}

/// Look at the backing image: it must be what it is said to be, and gives the size when there is no other.
fn resolve(
    args: &CreateArgs,
    new: &NamedFile,
    wanted: &Wanted,
    registry: &Registry,
) -> Result<(u64, ROption<BackingPointer>, ROption<ImageFacts>), Error> {
    let filename = new.path();
    let no_size = || usage(format!("'{}': creating an image needs a SIZE", escape_path(filename)));
    let Some(name) = &wanted.backing else {
        if wanted.backing_format.is_some() {
            return Err(usage("a backing format without a backing image makes no sense: add -b BASE"));
        }
        return Ok((wanted.size.ok_or_else(no_size)?, ROption::RNone, ROption::RNone));
    };
    let Some(format) = &wanted.backing_format else {
        return Err(usage("the format of the backing image is needed: add -F FMT"));
    };
    let pointer = BackingPointer::new(name.as_bytes().to_vec(), Some(format.as_bytes().to_vec()));
    if args.backing_unsafe {
        return Ok((wanted.size.ok_or_else(no_size)?, ROption::RSome(pointer), ROption::RNone));
    }
    let Some(directory) = new.directory() else {
        return Err(Error::image(filename, ErrorCode::OpenFailed, "cannot be created: its directory does not exist"));
    };
    if file_name(name.as_bytes()).is_err() {
        let message = format!("'{}' is not the name of a file: only files can be looked at (or use -u)", escape(name));
        return Err(Error::new(ErrorCode::OpenFailed, message));
    }
    let recorder = Recorder { path: filename, format: &args.format, directory, part: Part::Ancestor };
    let located = Gate::everywhere()?.find(&recorder, [name.as_bytes()], Access::Shared, None);
    let located = located.map_err(|error| match error.code {
        ErrorCode::BackingNotFound => Error::image(name.as_ref(), ErrorCode::BackingNotFound, "does not exist"),
        _ => error,
    });
    let located = located.map_err(|error| error.in_role(Role::Backing))?;
    if new.identity() == Some(located.identity()) {
        return Err(Error::image(filename, ErrorCode::ChainLoop, "an image cannot be backed by itself"));
    }
    let OpenedFile { file: image, path, .. } = OpenedFile::located(&located, &recorder, Access::Shared)?;
    // The new image has to be opened later: only the look at the backing is confined.
    let found = Confinement::aside(|| registry.identify(&image, Some(format)));
    let found = found.map_err(|error| Error::identify(&path, &error).in_role(Role::Backing))?;
    let size = wanted.size.unwrap_or(found.facts.virtual_size);
    Ok((size, ROption::RSome(pointer), ROption::RSome(found.facts)))
}

fn help(plugin: &Plugin) -> String {
    let mut text = format!("Options of {}:\n", plugin.name());
    let common = [
        ("size", "virtual size"),
        ("backing_file", "image that the new one is backed by"),
        ("backing_fmt", "format of the backing image"),
    ];
    for (name, help) in plugin.create_options().chain(common) {
        let _ = writeln!(text, "  {:<22} - {}", format!("{}=<value>", printable(name)), printable(help));
    }
    text
}

fn announcement(filename: &std::path::Path, plugin: &Plugin, virtual_size: u64, wanted: &Wanted) -> String {
    let mut text = format!("Formatting '{}', fmt={} size={virtual_size}", escape_path(filename), plugin.name());
    if let Some(backing) = &wanted.backing {
        let _ = write!(text, " backing_file={}", escape(backing));
    }
    if let Some(format) = &wanted.backing_format {
        let _ = write!(text, " backing_fmt={}", escape(format));
    }
    for (name, value) in &wanted.options {
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
