//! The request for a conversion, and its result.

use crate::devices::Cache;
use crate::image::SnapshotName;
use crate::operation::Settings;
use serde::Serialize;
use std::path::PathBuf;

/// The operator's request.
#[derive(Clone, Debug, Default)]
pub struct ConvertRequest {
    /// The source, with everything below it.
    pub source: PathBuf,
    /// More sources, whose disks follow that of the first.
    pub others: Vec<PathBuf>,
    /// Their format, if the operator names one.
    pub format: Option<String>,
    /// The internal snapshot to read instead of the source's own disk.
    pub snapshot: Option<SnapshotName>,
    /// Whether to read them even if another program is writing to them.
    pub force_share: bool,
    /// The new image. It replaces a file of that name.
    pub target: PathBuf,
    /// Its format.
    pub target_format: String,
    /// Options of that format.
    pub options: Vec<(String, String)>,
    /// The backing file that it records, and the format of that file.
    pub backing: Option<(String, String)>,
    /// Whether the target exists, and is written in place.
    pub in_place: bool,
    /// Whether all of its disk reads as zeroes already.
    pub target_is_zero: bool,
    /// Whether to compress the written data where that makes it shorter.
    pub compress: bool,
    /// Whether the target takes space for all of its disk.
    pub allocate: bool,
    /// The minimum length in bytes, a multiple of 512, of runs of zeroes that are left out; 0 to search for none.
    pub sparse: u64,
    /// Whether to copy the source's bitmaps …
    pub bitmaps: bool,
    /// … without those that were not saved, which are an error otherwise.
    pub skip_broken_bitmaps: bool,
    /// Whether unreadable data becomes zeroes in the target.
    pub salvage: bool,
    /// The maximum of bytes that move per second; 0 for no limit.
    pub rate_limit: u64,
    /// The maximum number of processors that the guest may use, if the operator limits it.
    pub processors: Option<usize>,
    /// The promises of writes to the target.
    pub cache: Cache,
    /// Plugins, directories, and the time to wait for a lock.
    pub settings: Settings,
}

/// The result of a conversion. It serializes to the JSON of `docs/convert.md`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConvertOutcome {
    /// The source's format: of several, the format of the first.
    pub source_format: String,
    /// The format of the new image.
    pub target_format: String,
    /// Bytes of the source's disk: of several, of all together.
    pub source_virtual_size: u64,
    /// Bytes of the new disk: more, if its format does not support every size.
    pub target_virtual_size: u64,
    /// Bytes that were written as data or zeroes; all others read as zeroes by themselves.
    pub bytes_converted: u64,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
    /// Warnings for the operator, each one line that names a file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}
