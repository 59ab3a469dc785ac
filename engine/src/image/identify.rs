//! Identifying the format of an open file, and whom to believe about it.
//!
//! A raw image has no signature, and its guest chooses the content of its first and last sectors, so the signature of another
//! format in it proves nothing. On the other hand, an overlay that calls a qcow2 image raw must not cause its header to be
//! overwritten. So raw is believed
//!
//! * for reading, where nothing is at stake;
//! * if the operator names it with `-f` or `-F`;
//! * of an image that records it for a file to be written, unless that has the certain mark of another format, or a likely
//!   one and a length of which no disk is. Even then, a commit that is repeated [may go on](crate::commit).
//!
//! The same holds for the other files of an image, whose signatures its plugin knows.

use super::advice::{RecordedRole, Recorder};
use super::chain_image::{ChainImage, Doubt};
use super::gate::Located;
use super::open::OpenedFile;
use crate::confine::Confinement;
use crate::error::Error;
use crate::escape::{escape_bytes, escape_path, shell_path};
use crate::plugins::{Foreign, IdentifyError, ImageRead, Mark, Registry, DAMAGED};
use instar_guest_abi::ErrorCode;
use instar_plugin_api::ImageFacts;
use std::path::Path;

/// Disks are made of sectors of this many bytes.
const SECTOR: u64 = 512;

/// What an image records of the format of the image that it is backed by.
#[derive(Clone, Copy, Debug)]
pub struct Recorded<'i> {
    /// The image that records it.
    recorder: Recorder<'i>,
    /// The name that it records.
    name: &'i [u8],
    /// The name of the format, if there is one.
    format: Option<&'i [u8]>,
    /// Bytes of the disk that the image above it has.
    disk: u64,
}

impl<'i> Recorded<'i> {
    /// The name of the format, if there is one.
    #[must_use]
    pub fn format(&self) -> Option<&'i [u8]> {
        self.format
    }

    /// What this image records of the file that its pointer led to. The format beside the name counts before the one within
    /// it, as in QEMU.
    #[must_use]
    pub fn by(image: &'i ChainImage<'_>, located: &'i Located) -> Self {
        let recorded = Self::unnamed(image);
        let format = recorded.format.or(located.format().map(str::as_bytes));
        Self { name: located.name(), format, ..recorded }
    }

    /// What this image records of its backing, if its pointer leads nowhere.
    #[must_use]
    pub fn unnamed(image: &'i ChainImage<'_>) -> Self {
        let pointer = image.facts.backing.as_ref().into_option();
        let format = pointer.and_then(|pointer| pointer.format.as_ref().into_option());
        let format = format.map(|format| format.as_slice()).filter(|format| !format.is_empty());
        let name = pointer.map_or(&[][..], |pointer| pointer.name.as_slice());
        Self { recorder: image.recorder(RecordedRole::Ancestor), name, format, disk: image.facts.virtual_size }
    }
}

impl Recorded<'_> {
    /// Refuse a file that the operator calls raw, if both its own mark and the image above it say that it is something else:
    /// nothing speaks for the operator's word, and a header would be overwritten. Where the image above records no format, the
    /// size of its disk speaks: an image is shorter than that, and what a guest writes makes no disk shorter.
    fn contradicts(&self, image: &ChainImage<'_>) -> Result<(), Error> {
        let Some(mark) = image.mark.as_ref().filter(|mark| image.insisted && mark.certain) else { return Ok(()) };
        let (raw, other, by) = (image.plugin.name(), &mark.format, escape_path(self.recorder.path));
        if self.format.is_none() && image.facts.virtual_size < self.disk {
            let clause = format!(
                "has the mark of a {other} image, and is shorter than the disk of '{by}', which records no format: committing \
                 into it as {raw} would destroy it; leave out -F {raw}, or, if it really is a plain disk, lengthen it first with \
                 `truncate -s {} {}`",
                self.disk,
                shell_path(&image.opened.path)
            );
            return Err(Error::image(&image.opened.path, ErrorCode::FormatMismatch, clause));
        }
        if self.format != Some(mark.format.as_bytes()) {
            return Ok(());
        }
        let clause = format!(
            "is a {other} image, and '{by}' records it as one, so that committing into it as {raw} would destroy it: leave \
             out -F {raw}; if it really is a plain disk, {}",
            self.recorder.record_raw(self.name)
        );
        Err(Error::image(&image.opened.path, ErrorCode::FormatMismatch, clause))
    }
}

/// Why the format of an image that the operator names is not known, and what to do. `option` is the one that names it.
#[must_use]
pub fn unknown_format(path: &Path, error: &IdentifyError, option: &str) -> Error {
    let advice = match error {
        IdentifyError::Unrecognised { .. } => format!(": if it is a plain disk, add {option} raw; {DAMAGED}"),
        IdentifyError::Foreign(Foreign::Empty) => format!(": if it is a plain disk, add {option} raw"),
        IdentifyError::NoPlugins { .. } => ": see `instar plugins`".to_owned(),
        _ => String::new(),
    };
    Error::image(path, error.code(), format!("{error}{advice}"))
}

impl OpenedFile {
    /// Identify the format. Refuses a `hint` of the operator's, given with `option`, that the file does not match; believes
    /// raw.
    ///
    /// # Errors
    /// When no plugin, or not the one that `hint` names, recognizes it.
    pub fn identify_as<'r>(
        self,
        registry: &'r Registry,
        hint: Option<&str>,
        option: &str,
    ) -> Result<ChainImage<'r>, Error> {
        let identified = self.identify(registry, hint, hint.is_some());
        identified.map_err(|(path, error)| unknown_format(&path, &error, option))
    }

    /// Do the same for an image above another one, which cannot be a raw disk.
    ///
    /// # Errors
    /// As [`OpenedFile::identify_as`].
    pub fn identify_overlay<'r>(self, registry: &'r Registry, hint: Option<&str>) -> Result<ChainImage<'r>, Error> {
        let image = self.identify(registry, hint, hint.is_some()).map_err(|(path, error)| match error {
            // It has an image below it, and so it is no plain disk.
            IdentifyError::Unrecognised { .. } => Error::image(&path, error.code(), format!("{error}: {DAMAGED}")),
            _ => Error::image(&path, error.code(), &error),
        })?;
        let Some(mark) = &image.mark else { return Ok(image) };
        let clause = format!(
            "is said to be {}, which has no backing file, but looks like {}: name its real format",
            image.plugin.name(),
            mark.format
        );
        Err(Error::image(&image.opened.path, ErrorCode::FormatMismatch, clause))
    }

    /// Identify the format of a file that is read below an image, which may record it.
    ///
    /// # Errors
    /// As [`OpenedFile::identify_as`].
    pub fn identify_recorded<'r>(
        self,
        registry: &'r Registry,
        recorded: Recorded<'_>,
    ) -> Result<ChainImage<'r>, Error> {
        let hint = recorded.format.map(String::from_utf8_lossy);
        self.identify(registry, hint.as_deref(), false).map_err(|(path, error)| {
            recorded_error(&path, &error, recorded, &recorded.recorder.record_raw(recorded.name))
        })
    }

    /// Identify the format of a file that is written below an image: the one that the operator `named`, or the recorded one. If
    /// a recorded raw cannot be believed, the image gets a [`Doubt`].
    ///
    /// # Errors
    /// As [`OpenedFile::identify_as`].
    pub fn identify_target<'r>(
        self,
        registry: &'r Registry,
        named: Option<&str>,
        recorded: Recorded<'_>,
    ) -> Result<ChainImage<'r>, Error> {
        let hint = named.map(Into::into).or_else(|| recorded.format.map(String::from_utf8_lossy));
        let identified = self.identify(registry, hint.as_deref(), named.is_some());
        let mut image = identified.map_err(|(path, error)| match (&error, named, recorded.format) {
            (IdentifyError::NotThisFormat { actual: None, .. }, Some(named), Some(format))
                if format != named.as_bytes() =>
            {
                let (by, format) = (escape_path(recorded.recorder.path), escape_bytes(format));
                let clause = format!("is no {named} image, and '{by}' records it as {format}: leave out -F {named}");
                Error::image(&path, error.code(), clause)
            }
            _ => recorded_error(&path, &error, recorded, "add -F raw"),
        })?;
        recorded.contradicts(&image)?;
        if image.insisted && recorded.format == Some(image.plugin.name().as_bytes()) {
            // Both say so: whatever the file looks like, its guest has written it.
            image.mark = None;
        }
        if let Some(mark) = image.mark.as_ref().filter(|mark| !image.insisted && forbids_writing(mark, &image.facts)) {
            let (raw, other) = (image.plugin.name(), &mark.format);
            let clause = format!(
                "looks like a {other} image, which would be overwritten, but '{}' records it as {raw}: if its \
                     guest wrote that, add -F {raw}; if it is a {other} image, add -F {other}",
                escape_path(recorded.recorder.path)
            );
            image.doubt = Some(Doubt { mark: mark.clone(), clause });
        }
        Ok(image)
    }

    fn identify<'r>(
        self,
        registry: &'r Registry,
        hint: Option<&str>,
        insisted: bool,
    ) -> Result<ChainImage<'r>, (std::path::PathBuf, IdentifyError)> {
        let look = || registry.identify(&self.file, hint);
        let found = if registry.looks_aside() { Confinement::in_confined_thread(look) } else { look() };
        match found {
            Ok(found) => Ok(ChainImage {
                snapshot: 0,
                opened: self,
                plugin: found.plugin,
                facts: found.facts,
                files: Vec::new(),
                insisted,
                mark: found.mark,
                doubt: None,
                follows: false,
            }),
            Err(error) => Err((self.path, error)),
        }
    }
}

/// Whether a file with this mark, and these facts as a disk without one, must not be written to on the word of an image.
fn forbids_writing(mark: &Mark, facts: &ImageFacts) -> bool {
    mark.certain || !facts.file_length.is_multiple_of(SECTOR)
}

/// Why the format of an image below another one is not known; `if_raw` is what to do if it is a plain disk.
fn recorded_error(path: &Path, error: &IdentifyError, recorded: Recorded<'_>, if_raw: &str) -> Error {
    let by = escape_path(recorded.recorder.path);
    let clause = match (error, recorded.format) {
        (IdentifyError::Unrecognised { .. }, _) => {
            format!("{error}; '{by}', which it is the backing of, records no format: if it is a plain disk, {if_raw}; {DAMAGED}")
        }
        (_, Some(format)) => format!("{error} ('{by}' records it as {})", escape_bytes(format)),
        (_, None) => format!("{error} (it is the backing of '{by}')"),
    };
    Error::image(path, error.code(), clause)
}

/// Refuse another file of an image that is written to, if it has the certain mark of another format than its plugin says that
/// it has (`expected`): the image would have its header overwritten. Not if the operator insists.
///
/// # Errors
/// [`ErrorCode::FormatMismatch`], with `option` as the way to insist; and when a plugin gives no answer.
pub(super) fn check_part(
    registry: &Registry,
    image: &ChainImage<'_>,
    part: &OpenedFile,
    expected: &str,
) -> Result<(), Error> {
    if image.insisted {
        return Ok(());
    }
    let mark = registry.mark(&part.file).map_err(|error| Error::identify(&part.path, &error))?;
    let Some(mark) = mark.filter(|mark| mark.format != expected) else { return Ok(()) };
    if !mark.certain && part.file.length().is_multiple_of(SECTOR) {
        return Ok(());
    }
    let (other, own, path) = (&mark.format, image.plugin.name(), escape_path(&image.opened.path));
    let clause = format!(
        "looks like a {other} image, which would be overwritten, but '{path}' names it as a part of itself: if a guest \
         wrote that into it, name the format of '{path}' with -F {own} (with -f {own}, if it is the overlay)"
    );
    Err(Error::image(&part.path, ErrorCode::FormatMismatch, clause))
}
