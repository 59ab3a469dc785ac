//! What a conversion is asked for, and what comes of it.

use crate::devices::Cache;
use crate::image::SnapshotName;
use crate::operation::Settings;
use serde::Serialize;
use std::path::PathBuf;

/// What the operator asks for.
#[derive(Clone, Debug, Default)]
pub struct ConvertRequest {
    /// The image that is read, with everything below it.
    pub source: PathBuf,
    /// More of them, whose disks follow that of the first.
    pub others: Vec<PathBuf>,
    /// Their format, if the operator names it.
    pub format: Option<String>,
    /// The internal snapshot of it that is read instead of its own disk.
    pub snapshot: Option<SnapshotName>,
    /// Read them even if something else is writing to them.
    pub force_share: bool,
    /// The image that is made. A file of that name is replaced.
    pub target: PathBuf,
    /// Its format.
    pub target_format: String,
    /// Options of that format.
    pub options: Vec<(String, String)>,
    /// The backing file that it gets, as it is recorded, and the format of that.
    pub backing: Option<(String, String)>,
    /// The target is there, and is written in place.
    pub in_place: bool,
    /// All of its disk reads as zeroes already.
    pub target_is_zero: bool,
    /// What is written into the target is compressed where it shrinks.
    pub compress: bool,
    /// The target allocates all of its disk.
    pub allocate: bool,
    /// Zeroes of so many bytes at least, a multiple of 512, are looked for in data, and left out; 0 does not look.
    pub sparse: u64,
    /// Make the bitmaps of the source in the target …
    pub bitmaps: bool,
    /// … but for those that were not saved, which are an error otherwise.
    pub skip_broken_bitmaps: bool,
    /// What cannot be read of the data is zero in the target.
    pub salvage: bool,
    /// Bytes that may move per second; 0 is no limit.
    pub rate_limit: u64,
    /// How many processors the guest may use, if the operator limits that.
    pub processors: Option<usize>,
    /// What writes to the target promise.
    pub cache: Cache,
    /// Plugins, directories, waiting.
    pub settings: Settings,
}

/// What was made. What is serialized is the JSON of `docs/convert.md`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConvertOutcome {
    /// The format of the image that was read: of several, of the first.
    pub source_format: String,
    /// The format of the new image.
    pub target_format: String,
    /// Bytes of the disk that was read: of several, of all together.
    pub source_virtual_size: u64,
    /// Bytes of the new one: more, if its format has not every size.
    pub target_virtual_size: u64,
    /// Bytes that were written as data or zeroes; the others read the same without that.
    pub bytes_converted: u64,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
    /// What the operator should know, each one line that names a file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}
