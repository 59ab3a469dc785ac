//! An image of a chain: opened once, locked, and known.

use super::directory::ImageDirectory;
use crate::commit::CommitError;
use crate::devices::lock::{lock, LockMode, Locked};
use crate::devices::ImageFile;
use crate::plugins::{IdentifyError, Plugin, Registry};
use instar_guest_abi::ErrorCode;
use instar_plugin_api::{BackingPointer, ImageFacts};
use std::path::Path;

/// An image of a chain.
#[derive(Debug)]
pub struct ChainImage<'r> {
    /// The open file.
    pub file: ImageFile,
    /// The plugin of its format.
    pub plugin: &'r Plugin,
    /// What its header says.
    pub facts: ImageFacts,
    /// Where the names in it begin.
    pub directory: ImageDirectory,
    /// Whether it is locked.
    pub locked: Locked,
}

impl ChainImage<'_> {
    /// Its name.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// What it records about the image below it.
    #[must_use]
    pub fn backing(&self) -> Option<&BackingPointer> {
        self.facts.backing.as_ref().into_option()
    }
}

/// Who says of which format an image is.
#[derive(Clone, Copy, Debug)]
pub enum Recorded<'a> {
    /// The operator, with `-f`, or nobody.
    Operator(Option<&'a str>),
    /// The image above it, or nobody: the format, and the name of the image above.
    Image(Option<&'a [u8]>, &'a Path),
}

/// Lock an opened image, and only then look at what it is.
///
/// # Errors
/// [`ErrorCode::ImageInUse`]; when the format is not known, or not the one that was said.
pub fn admit<'r>(
    registry: &'r Registry,
    file: ImageFile,
    mode: LockMode,
    recorded: Recorded<'_>,
) -> Result<ChainImage<'r>, CommitError> {
    let locked = lock(&file, mode).map_err(|error| in_use(file.path(), &error.0))?;
    let directory = ImageDirectory::of_image(file.path()).map_err(|error| {
        CommitError::image(file.path(), ErrorCode::OpenFailed, format!("its directory cannot be looked at: {error}"))
    })?;
    let (plugin, facts) = identify(registry, &file, recorded)?;
    Ok(ChainImage { file, plugin, facts, directory, locked })
}

fn in_use(path: &Path, text: &str) -> CommitError {
    let shown = crate::cli::escape::escape_path(path);
    let message = format!("{text}: Is another process using the image [{shown}]? Stop it, and run again");
    CommitError::new(ErrorCode::ImageInUse, message)
}

/// Which format an image is of. What someone says about it is verified, never believed.
pub(super) fn identify<'r>(
    registry: &'r Registry,
    file: &ImageFile,
    recorded: Recorded<'_>,
) -> Result<(&'r Plugin, ImageFacts), CommitError> {
    let hint = match recorded {
        Recorded::Operator(format) => format.map(str::to_owned),
        Recorded::Image(format, _) => format.map(|bytes| String::from_utf8_lossy(bytes).into_owned()),
    };
    let said_by = match recorded {
        Recorded::Operator(_) => "-f says".to_owned(),
        Recorded::Image(_, above) => format!("'{}' records", crate::cli::escape::escape_path(above)),
    };
    let path = file.path();
    let mismatch = |hint: &str, actual: &str| {
        let hint = crate::cli::escape::escape(hint);
        let clause = format!("{said_by} that it is a {hint} image, but it {actual}: correct that, nothing was changed");
        CommitError::image(path, ErrorCode::FormatMismatch, clause)
    };
    match registry.identify(file, hint.as_deref()) {
        Ok(found) => match (&found.looks_like, hint) {
            // Such a file must neither be written to nor copied from on the word of an image.
            (Some(actual), Some(hint)) => Err(mismatch(&hint, &format!("is a {actual} image"))),
            _ => Ok((found.plugin, found.facts)),
        },
        Err(IdentifyError::NotThisFormat { hint, actual: Some(actual) }) => {
            Err(mismatch(&hint, &format!("is a {actual} image")))
        }
        Err(IdentifyError::NotThisFormat { hint, actual: None }) => Err(mismatch(&hint, "is not")),
        Err(IdentifyError::Unrecognised) => {
            let clause = match recorded {
                Recorded::Operator(_) => "the format is not recognised; name it with -f".to_owned(),
                Recorded::Image(_, above) => format!(
                    "the format is not recognised, and '{}' does not record it; a raw image is taken only when its \
                     format is recorded",
                    crate::cli::escape::escape_path(above)
                ),
            };
            Err(CommitError::image(path, ErrorCode::UnsupportedFormat, clause))
        }
        Err(error) => Err(CommitError::image(path, error.code(), error)),
    }
}
