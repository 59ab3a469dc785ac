//! `instar measure`: the length of the file of an image that does not exist yet. The plugin of its format computes the
//! metadata; a map counts the content of an existing image.

mod operation;
mod units;

use crate::create::{options_of, plugin_of};
use crate::error::{Error, Role};
use crate::image::SnapshotName;
use crate::map::MODULE;
use crate::operation::{run, Session, Settings};
use crate::plugins::{Plugin, Registry};
use instar_guest_abi::ErrorCode;
use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{BitmapFacts, CreateSpec, Footprint};
use operation::Measure;
use serde::Serialize;
use std::path::PathBuf;

/// What would be in the new image.
#[derive(Clone, Debug)]
pub enum Content {
    /// A disk of this many bytes, of which nothing is allocated.
    Empty(u64),
    /// The disk of this image and the layers below it.
    Image {
        /// The image.
        path: PathBuf,
        /// Its format, if the operator names it.
        format: Option<String>,
        /// The internal snapshot whose disk it is, if it is not that of the image itself.
        snapshot: Option<SnapshotName>,
        /// Read the images even while another process writes to them.
        force_share: bool,
    },
}

/// The operator's request.
#[derive(Clone, Debug)]
pub struct MeasureRequest {
    /// What would be in the new image.
    pub content: Content,
    /// The format of the new image.
    pub format: String,
    /// Options of that format.
    pub options: Vec<(String, String)>,
    /// Plugins, directories, waiting.
    pub settings: Settings,
}

/// The length of a new image. Serializes to the keys of `qemu-img measure --output=json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MeasureOutcome {
    /// The sandbox that the guest ran in: "kvm" or "process"; `None` where no image had to be looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<&'static str>,
    /// Combined length of its files in bytes for the allocated part of the disk.
    pub required: u64,
    /// Combined length of its files in bytes for the whole disk.
    pub fully_allocated: u64,
    /// Additional bytes for copies of the image's persistent bitmaps; `None` if either image cannot have any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmaps: Option<u64>,
}

/// Measure a new image.
///
/// # Errors
/// One line that names the file and what to do. [`ErrorCode::NotImplemented`] for a format whose images cannot be measured.
pub fn run_measure(request: &MeasureRequest, session: &Session) -> Result<MeasureOutcome, Error> {
    match &request.content {
        Content::Empty(size) => {
            let registry = Registry::load(&request.settings.search);
            session.note_plugins(&registry);
            let plugin = plugin_of(&registry, &request.format)?;
            outcome(&footprint(plugin, request, *size, None)?, 0, None)
        }
        Content::Image { path, format, snapshot, force_share } => {
            let view = (format.as_deref(), snapshot.as_ref());
            let measure = Measure::new(request, path, view, *force_share);
            run(measure, session).map_err(|error| error.of_image(path, Some(Role::Ancestor)))
        }
    }
}

/// Ask the plugin for the space of a new image with a disk of this size, and with copies of these bitmaps, if it is a copy of
/// an image that can have some.
fn footprint(
    plugin: &Plugin,
    request: &MeasureRequest,
    virtual_size: u64,
    bitmaps: Option<&[BitmapFacts]>,
) -> Result<Footprint, Error> {
    let spec = CreateSpec {
        virtual_size,
        file_name: RVec::new(),
        backing: ROption::RNone,
        backing_facts: ROption::RNone,
        options: options_of(&request.options),
    };
    // Sectors are whole.
    if virtual_size.checked_next_multiple_of(512).is_none_or(|size| i64::try_from(size).is_err()) {
        return Err(Error::new(
            ErrorCode::UnsupportedFormat,
            "the new disk is too large: it can have 2^63 - 512 bytes",
        ));
    }
    let mut footprint = plugin.measure(&spec, bitmaps.unwrap_or_default()).map_err(|failure| {
        Error::new(failure.code(), format!("an image of the format {}: {failure}", plugin.name()))
    })?;
    footprint.bitmaps = footprint.bitmaps.into_option().filter(|_| bitmaps.is_some()).into();
    Ok(footprint)
}

fn outcome(footprint: &Footprint, units: u64, sandbox: Option<&'static str>) -> Result<MeasureOutcome, Error> {
    let all = footprint.required(units).zip(footprint.fully_allocated());
    let (required, fully_allocated) =
        all.ok_or_else(|| Error::new(ErrorCode::UnsupportedFormat, "the new image would be longer than any file"))?;
    Ok(MeasureOutcome { sandbox, required, fully_allocated, bitmaps: footprint.bitmaps.into_option() })
}
