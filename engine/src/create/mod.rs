//! `instar create`: a new, empty image, whose bytes its format's plugin lays out.

mod file;
mod likeness;
mod new_file;
mod parts;

pub(crate) use file::write_to;
pub(crate) use likeness::look_like;
pub(crate) use new_file::NewFile;
pub(crate) use parts::Parts;

use crate::cancel::Cancel;
use crate::error::{Error, Role};
use crate::escape::{escape, escape_path};
use crate::image::{
    file_name, use_undo_directory, Access, ChainImage, Descent, Gate, NamedFile, OpenedFile, RecordedRole, Recorder,
};
use crate::plugins::{Plugin, Registry, SearchPath};
use instar_guest_abi::{ErrorCode, MAX_CHAIN_DEVICES};
use instar_plugin_api::std_types::{ROption, RString, RVec, Tuple2};
use instar_plugin_api::{BackingPointer, CreateSpec, ImageFacts};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The operator's request.
#[derive(Clone, Debug, Default)]
pub struct CreateRequest {
    /// The new image.
    pub image: PathBuf,
    /// Its format.
    pub format: String,
    /// Its virtual size in bytes; that of the backing if it is not given.
    pub size: Option<u64>,
    /// The image below it, as it is recorded.
    pub backing: Option<String>,
    /// The format of that, which goes with it.
    pub backing_format: Option<String>,
    /// Do not look at the image below.
    pub backing_unsafe: bool,
    /// Options of the format.
    pub options: Vec<(String, String)>,
    /// Refuse to overwrite an existing file.
    pub no_clobber: bool,
    /// The search path for plugins.
    pub search: SearchPath,
    /// The directory of the undo logs of block devices.
    pub undo_directory: Option<PathBuf>,
}

/// The image that was created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Created {
    /// The name of its format.
    pub format: String,
    /// Its virtual size in bytes.
    pub virtual_size: u64,
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::BadUsage, message)
}

/// The plugin of a format that the operator names.
///
/// # Errors
/// [`ErrorCode::PluginUnavailable`].
pub(crate) fn plugin_of<'r>(registry: &'r Registry, format: &str) -> Result<&'r Plugin, Error> {
    Error::if_refused(registry)?;
    registry.by_format(format).ok_or_else(|| {
        let unknown = registry.unknown_format(format);
        Error::new(unknown.code(), unknown.to_string())
    })
}

/// Options as a plugin takes them.
pub(crate) fn options_of(pairs: &[(String, String)]) -> RVec<Tuple2<RString, RString>> {
    pairs.iter().map(|(name, value)| Tuple2(RString::from(name.as_str()), RString::from(value.as_str()))).collect()
}

/// Return the name of a format and its options for new images, each with one line of help.
///
/// # Errors
/// [`ErrorCode::PluginUnavailable`].
pub fn create_options(format: &str, search: &SearchPath) -> Result<(String, Vec<(String, String)>), Error> {
    let registry = Registry::load(search);
    let plugin = plugin_of(&registry, format)?;
    let options = plugin.create_options().map(|(name, help)| (name.to_owned(), help.to_owned()));
    Ok((plugin.name().to_owned(), options.collect()))
}

/// Create an image. Only the thread that looks at the backing is confined, because the process has to write a new file
/// afterwards.
///
/// # Errors
/// When the format, an option or the backing image is refused, or the file cannot be written. Nothing is changed unless
/// everything but the writing has succeeded.
pub fn run_create(request: &CreateRequest) -> Result<Created, Error> {
    let registry = Registry::load(&request.search).looking_aside();
    let plugin = plugin_of(&registry, &request.format)?;
    let file = NamedFile::new(&request.image);
    use_undo_directory(request.undo_directory.as_deref())?;
    file.refuse_unfinished()?;
    let (virtual_size, backing, backing_facts) = resolve(request, &file, &registry)?;
    let options = options_of(&request.options);
    let file_name = request.image.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default().into();
    let spec = CreateSpec { virtual_size, file_name, backing, backing_facts, options };
    let image = plugin.create(&spec).map_err(|failure| Error::plugin(&request.image, &failure))?;
    file::write(&file, &image, request.no_clobber)?;
    Ok(Created { format: plugin.name().to_owned(), virtual_size })
}

/// Look at the backing image: it must be what it is said to be, and gives the size when there is no other.
fn resolve(
    request: &CreateRequest,
    new: &NamedFile,
    registry: &Registry,
) -> Result<(u64, ROption<BackingPointer>, ROption<ImageFacts>), Error> {
    let filename = new.path();
    let no_size = || usage(format!("'{}': creating an image needs a SIZE", escape_path(filename)));
    let Some(name) = &request.backing else {
        if request.backing_format.is_some() {
            return Err(usage("a backing format without a backing image makes no sense: add -b BASE"));
        }
        return Ok((request.size.ok_or_else(no_size)?, ROption::RNone, ROption::RNone));
    };
    let Some(format) = &request.backing_format else {
        return Err(usage("the format of the backing image is needed: add -F FMT"));
    };
    let pointer = BackingPointer::new(name.as_bytes().to_vec(), Some(format.as_bytes().to_vec()));
    if request.backing_unsafe {
        return Ok((request.size.ok_or_else(no_size)?, ROption::RSome(pointer), ROption::RNone));
    }
    let Some(directory) = new.directory() else {
        return Err(Error::image(filename, ErrorCode::OpenFailed, "cannot be created: its directory does not exist"));
    };
    if file_name(name.as_bytes()).is_err() {
        let message = format!("'{}' is not the name of a file: only files can be looked at (or use -u)", escape(name));
        return Err(Error::new(ErrorCode::OpenFailed, message));
    }
    let recorder = Recorder { path: filename, format: &request.format, directory, role: RecordedRole::Ancestor };
    let located = Gate::everywhere()?.find(&recorder, [name.as_bytes()], Access::Shared, None);
    let located = located.map_err(|error| match error.code {
        ErrorCode::BackingNotFound => Error::image(name.as_ref(), ErrorCode::BackingNotFound, "does not exist"),
        _ => error,
    });
    let located = located.map_err(|error| error.in_role(Role::Backing))?;
    if new.identity() == Some(located.identity()) {
        return Err(Error::image(filename, ErrorCode::ChainLoop, "an image cannot be backed by itself"));
    }
    let opened = OpenedFile::located(&located, &recorder, Access::Shared)?;
    let backing = opened.identify_as(registry, Some(format), "-F").map_err(|error| error.in_role(Role::Backing))?;
    refuse_ancestor(registry, new, &backing)?;
    let size = request.size.unwrap_or(backing.facts.virtual_size);
    Ok((size, ROption::RSome(pointer), ROption::RSome(backing.facts)))
}

/// Refuse to write over an image that the backing is backed by in its turn: it would be lost, and the chain a circle. What
/// cannot be followed is not in the way.
fn refuse_ancestor(registry: &Registry, new: &NamedFile, backing: &ChainImage<'_>) -> Result<(), Error> {
    let Some(overwritten) = new.identity() else { return Ok(()) };
    let (gate, role, access) = (Gate::everywhere()?, RecordedRole::Ancestor, Access::Shared);
    // Nothing was begun that would have to be ended in order: a signal ends the process.
    let cancel = Cancel::new();
    let mut descent = Descent::new(registry, &gate, &backing.opened.path, MAX_CHAIN_DEVICES, &cancel);
    let mut lowest: Option<ChainImage<'_>> = None;
    loop {
        let above = lowest.as_ref().unwrap_or(backing);
        let Ok(Some(located)) = descent.next(above, role, access, None) else { return Ok(()) };
        if located.identity() == overwritten {
            let clause = format!(
                "would be overwritten, and is what '{}' is backed by, on which the new image is to be made: give it another name",
                escape_path(&above.opened.path)
            );
            return Err(Error::image(new.path(), ErrorCode::ChainLoop, clause));
        }
        let Ok(below) = descent.open(above, &located, role, access) else { return Ok(()) };
        lowest = Some(below);
    }
}
