//! `instar info`: the facts about an image, from its plugin's host half alone.

use crate::confine::{Needs, Reach, Work};
use crate::error::{Error, Role};
use crate::escape::escape_bytes;
use crate::image::{
    file_name, parent_mismatch, unfinished_below, use_undo_directory, Access, ChainImage, Descent, Gate, NamedFile,
    RecordedRole,
};
use crate::lookup::Directory;
use crate::operation::Session;
use crate::plugins::{ImageFiles, Registry, SearchPath};
use instar_guest_abi::{ErrorCode, MAX_CHAIN_DEVICES};
use instar_plugin_api::{FactValue, ImageFacts, SnapshotFacts};
use rustix::fs::AtFlags;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The operator's request.
#[derive(Clone, Debug, Default)]
pub struct InfoRequest {
    /// The image.
    pub image: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// Show the images of its backing chain as well.
    pub backing_chain: bool,
    /// The search path for plugins.
    pub search: SearchPath,
    /// The directory of the undo logs of block devices.
    pub undo_directory: Option<PathBuf>,
}

/// One image of a chain. Serializes to the keys of `qemu-img info --output=json`, and `notes`.
#[derive(Clone, Debug)]
pub struct ImageInfo {
    /// Its path, as the operator or the image above has it.
    pub filename: PathBuf,
    /// Bytes of the disk that its files take.
    pub actual_size: u64,
    /// The facts from its header.
    pub facts: ImageFacts,
    /// Notes of its plugin, one line each.
    pub notes: Vec<String>,
    /// Where the backing file is; `None` for one behind a protocol.
    pub backing_path: Option<PathBuf>,
}

/// Examine an image and, if requested, its backing chain. Returns at least one image, top-most first.
///
/// # Errors
/// When an image cannot be opened, or its format is not known or not the one that was named.
pub fn run_info(request: &InfoRequest, session: &Session) -> Result<Vec<ImageInfo>, Error> {
    let registry = Registry::load(&request.search);
    Error::if_refused(&registry)?;
    use_undo_directory(request.undo_directory.as_deref())?;
    collect(&registry, request, session)
}

/// The image and, if wanted, those below it. The process is confined before an image is read.
fn collect(registry: &Registry, request: &InfoRequest, session: &Session) -> Result<Vec<ImageInfo>, Error> {
    let file = NamedFile::new(&request.image);
    let gate = Gate::everywhere()?;
    if request.backing_chain {
        // The names that images record are followed wherever they lead, as `qemu-img info` does, but only to read.
        let reach = Reach::default().add(gate.roots().top(), false).with_listing(Work::OpenAndLook.lists_directories());
        session.begin(reach, Work::OpenAndLook, &Needs::default());
    }
    let opened = file.open(Access::Shared, ErrorCode::ImageNotFound).map_err(|error| error.in_role(Role::Image))?;
    if !request.backing_chain {
        session.begin(Reach::default(), Work::Look, &Needs::default());
    }
    let first = opened.identify_as(registry, request.format.as_deref(), "-f");
    let mut image = first.map_err(|error| error.in_role(Role::Image))?;
    let mut descent = Descent::new(registry, &gate, file.path(), MAX_CHAIN_DEVICES, session.cancel());
    descent.passed(image.opened.identity);
    let mut images: Vec<ImageInfo> = Vec::new();
    let mut path = request.image.clone();
    loop {
        let role = if images.is_empty() { Role::Image } else { Role::Ancestor };
        let info = look(&image, path).map_err(|error| error.in_role(role))?;
        let next = if request.backing_chain { below(&mut descent, &image) } else { Ok(None) };
        let next = next.map_err(|error| error.in_role(Role::Ancestor))?;
        let Some((name, parent)) = next else {
            images.push(info);
            return Ok(images);
        };
        let backing_path = resolve_backing(&info.filename, &name);
        path = backing_path.clone().unwrap_or_default();
        let clause = parent_mismatch(&image.facts, &path, parent.plugin, &parent.facts);
        let mut info = ImageInfo { backing_path, ..info };
        info.notes.extend(clause.map(|clause| format!("it {clause}")));
        images.push(info);
        image = parent;
    }
}

/// The image below this one, and the name that led to it. One behind a protocol is never followed.
fn below<'r>(
    descent: &mut Descent<'r, '_>,
    image: &ChainImage<'_>,
) -> Result<Option<(Vec<u8>, ChainImage<'r>)>, Error> {
    let pointer = image.facts.backing.as_ref().into_option();
    if !pointer.is_some_and(|pointer| pointer.names().any(|name| file_name(name).is_ok())) {
        return Ok(None);
    }
    let (role, access) = (RecordedRole::Ancestor, Access::Shared);
    let Some(located) = descent.next(image, role, access, None)? else { return Ok(None) };
    let parent = descent.open(image, &located, role, access)?;
    Ok(Some((located.name().to_vec(), parent)))
}

/// What is said of an image at `path` by itself.
fn look(image: &ChainImage<'_>, path: PathBuf) -> Result<ImageInfo, Error> {
    let ChainImage { opened, plugin, facts, .. } = image;
    let mut notes = plugin.notes(ImageFiles::one(&opened.file), facts);
    let mut actual_size = opened.file.file().metadata().map_or(0, |metadata| metadata.blocks().saturating_mul(512));
    for other in &plugin.files(&opened.file).map_err(|failure| Error::plugin(&path, &failure))? {
        match allocated(&opened.directory, &other.name) {
            Some(size) => actual_size = actual_size.saturating_add(size),
            None => notes.push(format!("its file '{}' is not there", escape_bytes(&other.name))),
        }
    }
    let backing_path = facts.backing.as_ref().into_option().and_then(|backing| {
        let beside = backing.names().find(|name| is_below(&opened.directory, name));
        resolve_backing(&path, beside.unwrap_or(&backing.name))
    });
    let below = facts.backing.as_ref().into_option().zip(backing_path.as_ref());
    if let Some((backing, path)) = below {
        let clause = backing.names().find_map(|name| unfinished_below(&opened.directory, name, path));
        notes.extend(clause.map(|clause| format!("its backing file {clause}")));
    }
    Ok(ImageInfo { filename: path, actual_size, facts: facts.clone(), notes, backing_path })
}

/// Bytes of the disk that a file takes which an image in this directory names. It is not opened, and no more than that is
/// told of it.
fn allocated(directory: &Directory, name: &[u8]) -> Option<u64> {
    let file = file_name(name).ok()?;
    let stat = rustix::fs::statat(directory, OsStr::from_bytes(&file.path), AtFlags::empty()).ok()?;
    Some(u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512))
}

/// Whether there is a file of this relative name: of several that may be meant, the one to be shown. It is not opened.
fn is_below(directory: &Directory, name: &[u8]) -> bool {
    let file = file_name(name).ok().filter(|file| !file.from_working_directory && !file.path.starts_with(b"/"));
    file.is_some_and(|file| rustix::fs::statat(directory, OsStr::from_bytes(&file.path), AtFlags::empty()).is_ok())
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

impl ImageInfo {
    /// Return the internal snapshots, each as an object with the keys of `qemu-img info`; `None` if there are none.
    #[must_use]
    pub fn snapshots(&self) -> Option<Vec<Value>> {
        let snapshots = &self.facts.snapshots;
        (!snapshots.is_empty()).then(|| snapshots.iter().map(snapshot_json).collect())
    }

    /// Return the features of the `format-specific` section.
    pub fn specific(&self) -> impl Iterator<Item = (String, Value)> + '_ {
        let shown = self.facts.features.iter().filter(|feature| feature.in_info);
        shown.map(|feature| (feature.name.to_string(), json(&feature.value)))
    }

    /// Return the recorded names of the backing file and its format.
    #[must_use]
    pub fn backing(&self) -> Option<(&[u8], Option<&[u8]>)> {
        let backing = self.facts.backing.as_ref().into_option().filter(|backing| !backing.name.is_empty())?;
        Some((&backing.name, backing.format.as_ref().into_option().map(|format| format.as_slice())))
    }
}

/// A value as JSON. How deep it is nested, `Plugin::facts` has bounded.
fn json(value: &FactValue) -> Value {
    match value {
        FactValue::Flag(flag) => (*flag).into(),
        FactValue::Number(number) => (*number).into(),
        FactValue::Text(text) => text.as_str().into(),
        FactValue::List(values) => values.iter().map(json).collect(),
        FactValue::Record(fields) => {
            Value::Object(fields.iter().map(|field| (field.name.to_string(), json(&field.value))).collect())
        }
    }
}

/// An internal snapshot, with the keys of `qemu-img info` in their order.
fn snapshot_json(snapshot: &SnapshotFacts) -> Value {
    const NANOSECONDS: u64 = 1_000_000_000;
    let text = |bytes: &[u8]| Value::from(String::from_utf8_lossy(bytes));
    let count = snapshot.instructions.into_option().map(|count| ("icount", count.into()));
    let fields = [
        ("vm-clock-nsec", (snapshot.vm_clock_nanoseconds % NANOSECONDS).into()),
        ("name", text(&snapshot.name)),
        ("date-sec", snapshot.date_seconds.into()),
        ("date-nsec", snapshot.date_nanoseconds.into()),
        ("vm-clock-sec", (snapshot.vm_clock_nanoseconds / NANOSECONDS).into()),
        ("id", text(&snapshot.id)),
        ("vm-state-size", snapshot.vm_state_size.into()),
    ];
    Value::Object(count.into_iter().chain(fields).map(|(name, value)| (name.to_owned(), value)).collect())
}

/// The `format-specific` section.
#[derive(Serialize)]
struct Specific<'i> {
    #[serde(rename = "type")]
    kind: &'i str,
    data: Map<String, Value>,
}

/// The keys in their order.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Keys<'i> {
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshots: Option<Vec<Value>>,
    virtual_size: u64,
    filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    format: &'i str,
    actual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    encrypted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<Specific<'i>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    dirty_flag: bool,
    /// Not a key of `qemu-img info`, and only there if there is something to say.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    notes: &'i [String],
}

impl Serialize for ImageInfo {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let Self { filename, actual_size, facts, notes, backing_path } = self;
        let (name, format) = self.backing().map_or((None, None), |(name, format)| (Some(name), format));
        let data: Map<String, Value> = self.specific().collect();
        let path = backing_path.as_deref().filter(|_| name.is_some());
        Keys {
            backing_filename_format: format.map(text),
            snapshots: self.snapshots(),
            virtual_size: facts.virtual_size,
            filename: filename.to_string_lossy().into_owned(),
            cluster_size: Some(facts.cluster_size).filter(|&size| size != 0),
            format: facts.format.as_str(),
            actual_size: *actual_size,
            encrypted: facts.encrypted.then_some(true),
            format_specific: (!data.is_empty()).then(|| Specific { kind: facts.format.as_str(), data }),
            full_backing_filename: path.map(|path| path.to_string_lossy().into_owned()),
            backing_filename: name.map(text),
            dirty_flag: facts.dirty,
            notes,
        }
        .serialize(serializer)
    }
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
