//! `instar info`: what an image is, in the words of `qemu-img info`.

use super::info_text;
use super::output::{print, print_json, OutputFormat};
use super::snapshot_text;
use crate::confine::{Confinement, Reach, Work};
use crate::error::{Error, Role};
use crate::escape::escape_bytes;
use crate::image::{file_name, parent_mismatch, unknown_format, Access, Gate, NamedFile, OpenedFile, Part, Recorder};
use crate::lookup::Directory;
use crate::plugins::{IdentifyError, ImageFiles, Registry, SearchPath};
use clap::Args;
use instar_guest_abi::{ErrorCode, MAX_CHAIN_DEVICES};
use instar_plugin_api::ImageFacts;
use rustix::fs::AtFlags;
use serde_json::{Map, Value};
use std::collections::HashSet;
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Most images in a chain that is shown: as many as a commit takes.
const MAX_DEPTH: usize = MAX_CHAIN_DEVICES + 1;

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
    /// Taken for the sake of scripts: an image in use can always be shown
    #[arg(short = 'U', long, hide = true)]
    pub force_share: bool,
    /// Also load plugins from DIR; may be given several times
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
    /// The image
    #[arg(value_name = "FILENAME")]
    pub filename: PathBuf,
}

/// One image of a chain.
pub(super) struct Shown {
    pub filename: PathBuf,
    pub actual_size: u64,
    pub facts: ImageFacts,
    /// What its plugin has to say besides, one line each.
    pub notes: Vec<String>,
    /// Where the backing file is; `None` for one behind a protocol.
    pub backing_path: Option<PathBuf>,
}

/// Run the command, and [confine](crate::confine) the process for good.
///
/// # Errors
/// When an image cannot be opened, or its format is not known or not the one that was named.
pub fn run(args: &InfoArgs, out: &mut dyn Write) -> Result<(), Error> {
    show(args, true, out)
}

/// The same for a program that goes on afterwards: confined only if it is wanted.
///
/// # Errors
/// As [`run`].
pub fn show(args: &InfoArgs, confine: bool, out: &mut dyn Write) -> Result<(), Error> {
    snapshot_text::prepare();
    let registry =
        Registry::load(&SearchPath::for_process(&args.plugin_dir, &super::configuration(args.output)?.plugin_paths()));
    Error::if_refused(&registry)?;
    let images = collect(&registry, args, confine)?;
    match args.output {
        OutputFormat::Human => {
            let texts: Vec<String> = images.iter().map(info_text::human).collect();
            print(out, &texts.join("\n"))
        }
        OutputFormat::Json => {
            let mut values: Vec<Value> = images.iter().map(json).collect();
            let value = if args.backing_chain { Value::Array(values) } else { values.swap_remove(0) };
            print_json(out, &value)
        }
    }
}

/// The image and, if wanted, those below it. The process is confined before an image is read.
fn collect(registry: &Registry, args: &InfoArgs, confine: bool) -> Result<Vec<Shown>, Error> {
    let chain = args.backing_chain;
    let file = NamedFile::new(&args.filename);
    let gate = Gate::everywhere()?;
    if chain && confine {
        // The names that images record are followed wherever they lead, as `qemu-img info` does, but only to read.
        let _ = Confinement::begin(&Reach::default().add(gate.roots().top(), false), Work::OpenAndLook);
    }
    let mut images: Vec<Shown> = Vec::new();
    let mut seen = HashSet::new();
    let mut opened = file.open(Access::Shared, ErrorCode::ImageNotFound).map_err(|error| error.in_role(Role::Image))?;
    let (mut path, mut hint) = (args.filename.clone(), args.format.clone());
    if !chain && confine {
        let _ = Confinement::begin(&Reach::default(), Work::Look);
    }
    let mut unnamed = None;
    loop {
        let role = if images.is_empty() { Role::Image } else { Role::Ancestor };
        if !seen.insert(opened.identity) {
            let clause = "the backing chain leads back to this image";
            return Err(Error::image(&path, ErrorCode::ChainLoop, clause));
        }
        let image = &opened.file;
        let found = registry.identify(image, hint.as_deref()).map_err(|error| {
            let known = match (&unnamed, &error) {
                (None, _) => unknown_format(&path, &error),
                (Some(advice), IdentifyError::Unrecognised { .. }) => {
                    Error::image(&path, error.code(), format!("{error}; {advice}"))
                }
                (Some(_), _) => Error::identify(&path, &error),
            };
            known.in_role(role)
        })?;
        let facts = found.facts;
        let mut notes = found.plugin.notes(ImageFiles::one(image), &facts);
        let mut actual_size = image.file().metadata().map_or(0, |metadata| metadata.blocks().saturating_mul(512));
        let others = found.plugin.files(image).map_err(|failure| Error::plugin(&path, &failure).in_role(role))?;
        for other in &others {
            match allocated(&opened.directory, &other.name) {
                Some(size) => actual_size = actual_size.saturating_add(size),
                None => notes.push(format!("its extent '{}' is not there", escape_bytes(&other.name))),
            }
        }
        let backing = facts.backing.as_ref().into_option().cloned();
        let format = facts.format.to_string();
        if let Some(child) = images.last_mut() {
            let clause = parent_mismatch(&child.facts, &path, &facts);
            child.notes.extend(clause.map(|clause| format!("it {clause}")));
        }
        let first = backing.as_ref().and_then(|backing| resolve_backing(&path, &backing.name));
        // One behind a protocol is never followed.
        let Some(backing) = backing.filter(|backing| chain && backing.names().any(|name| file_name(name).is_ok()))
        else {
            images.push(Shown { filename: path, actual_size, facts, notes, backing_path: first });
            return Ok(images);
        };
        if images.len() + 1 == MAX_DEPTH {
            let clause = format!("the backing chain has more than {MAX_DEPTH} images");
            return Err(Error::image(file.path(), ErrorCode::ChainTooDeep, clause));
        }
        let (above, part) = (&opened.path, Part::Ancestor);
        let recorder = Recorder { path: above, format: &format, directory: &opened.directory, part };
        let located = gate.find(&recorder, backing.names(), Access::Shared, None);
        let located = located.map_err(|error| error.in_role(Role::Ancestor))?;
        let recorded = backing.format.into_option().map(|format| String::from_utf8_lossy(&format).into_owned());
        hint = recorded.or_else(|| located.format().map(str::to_owned));
        unnamed = Some(format!("if it is a plain disk, {}", recorder.record_raw(located.name())));
        let below = resolve_backing(&path, located.name());
        let filename = std::mem::replace(&mut path, below.clone().unwrap_or_default());
        images.push(Shown { filename, actual_size, facts, notes, backing_path: below });
        opened =
            OpenedFile::located(&located, &recorder, Access::Shared).map_err(|error| error.in_role(Role::Ancestor))?;
    }
}

/// Bytes of the disk that a file takes which an image in this directory names. It is not opened, and no more than that is
/// told of it.
fn allocated(directory: &Directory, name: &[u8]) -> Option<u64> {
    let file = file_name(name).ok()?;
    let stat = rustix::fs::statat(directory, OsStr::from_bytes(&file.path), AtFlags::empty()).ok()?;
    Some(u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512))
}

/// Where the backing file that `image` records is, for people: a relative name begins at the image's own directory. `None`
/// for a name that means no file (`nbd:` …).
fn resolve_backing(image: &Path, name: &[u8]) -> Option<PathBuf> {
    let file = file_name(name).ok()?;
    let path = Path::new(OsStr::from_bytes(&file.path));
    if file.from_working_directory {
        return Some(path.to_owned());
    }
    Some(image.parent().unwrap_or(Path::new("")).join(path))
}

/// The keys of `qemu-img info --output=json`, and `notes`.
fn json(image: &Shown) -> Value {
    let facts = &image.facts;
    let mut map = Map::new();
    let backing = facts.backing.as_ref().into_option();
    if let Some(format) = backing.and_then(|backing| backing.format.as_ref().into_option()) {
        map.insert("backing-filename-format".into(), String::from_utf8_lossy(format).into());
    }
    if let Some(snapshots) = snapshots(facts) {
        map.insert("snapshots".into(), snapshots.into());
    }
    map.insert("virtual-size".into(), facts.virtual_size.into());
    map.insert("filename".into(), image.filename.to_string_lossy().into());
    if facts.cluster_size != 0 {
        map.insert("cluster-size".into(), facts.cluster_size.into());
    }
    map.insert("format".into(), facts.format.as_str().into());
    map.insert("actual-size".into(), image.actual_size.into());
    if facts.encrypted {
        map.insert("encrypted".into(), true.into());
    }
    let data: Map<String, Value> = specific(facts).collect();
    if !data.is_empty() {
        let mut specific = Map::new();
        specific.insert("type".into(), facts.format.as_str().into());
        specific.insert("data".into(), data.into());
        map.insert("format-specific".into(), specific.into());
    }
    if let Some(backing) = backing {
        if let Some(path) = &image.backing_path {
            map.insert("full-backing-filename".into(), path.to_string_lossy().into());
        }
        map.insert("backing-filename".into(), String::from_utf8_lossy(&backing.name).into());
    }
    map.insert("dirty-flag".into(), facts.dirty.into());
    // Not a key of `qemu-img info`, and only there if there is something to say.
    if !image.notes.is_empty() {
        map.insert("notes".into(), image.notes.as_slice().into());
    }
    map.into()
}

/// The feature with the internal snapshots, which `qemu-img info` shows beside the others.
const SNAPSHOT_LIST: &str = "snapshot-list";

/// The internal snapshots, each an object with the keys of `qemu-img info`; `None` if there are none.
pub(super) fn snapshots(facts: &ImageFacts) -> Option<Vec<Value>> {
    let feature = facts.features.iter().find(|feature| feature.name == SNAPSHOT_LIST)?;
    serde_json::from_str(&feature.json).ok().filter(|list: &Vec<Value>| !list.is_empty())
}

/// The features of the `format-specific` section.
pub(super) fn specific(facts: &ImageFacts) -> impl Iterator<Item = (String, Value)> + '_ {
    facts.features.iter().filter(|feature| feature.in_info).map(|feature| {
        // `Plugin::facts` has seen to it that it is JSON.
        let value =
            serde_json::from_str(&feature.json).unwrap_or_else(|_| escape_bytes(feature.json.as_bytes()).into());
        (feature.name.to_string(), value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_names_begin_at_the_image() {
        for (image, name, expected) in [
            ("top.qcow2", "base", Some("base")),
            ("dir/top.qcow2", "base", Some("dir/base")),
            ("/a/top.qcow2", "../b/base", Some("/a/../b/base")),
            ("dir/top.qcow2", "/abs", Some("/abs")),
            ("top.qcow2", "./a:b", Some("./a:b")),
            ("top.qcow2", "nbd:host:1", None),
            ("top.qcow2", "json:{}", None),
            ("dir/top.qcow2", "file:/x/base", Some("/x/base")),
            ("top.qcow2", "a\0b", None),
        ] {
            assert_eq!(resolve_backing(Path::new(image), name.as_bytes()), expected.map(PathBuf::from), "{name}");
        }
    }
}
