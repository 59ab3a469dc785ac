//! Which format an image is of.

use super::{ImageFiles, ImageRead, Plugin, PluginFailure, Registry};
use instar_guest_abi::ErrorCode;
use instar_plugin_api::{ImageFacts, PROBE_ANYTHING, PROBE_NO};
use std::path::PathBuf;

/// An image whose format is known.
#[derive(Debug)]
pub struct Identified<'r> {
    /// The plugin of the format.
    pub plugin: &'r Plugin,
    /// What the header says.
    pub facts: ImageFacts,
    /// For a format that any bytes are an image of (raw): the format that the file looks like besides. Such a file
    /// must not be written to on the word of an image.
    pub looks_like: Option<String>,
}

/// Why the format of an image is not known. The text does not name the image: the caller adds that.
#[derive(Debug, thiserror::Error)]
pub enum IdentifyError {
    /// No plugin has the format that was named.
    #[error("unknown format '{}': no plugin for it is loaded (see `instar plugins`)", .hint.escape_default())]
    UnknownFormat {
        /// The format that was named.
        hint: String,
    },
    /// Several plugins claim the format, so that none is used.
    #[error("format '{name}' is claimed by {}: keep one of them", list(.libraries))]
    ClaimedTwice {
        /// The format.
        name: String,
        /// The libraries.
        libraries: Vec<PathBuf>,
    },
    /// The image is not of the format that was named.
    #[error("not a {hint} image{}", .actual.as_ref().map(|name| format!(", but a {name} image")).unwrap_or_default())]
    NotThisFormat {
        /// The format that was named.
        hint: String,
        /// The format that it looks like instead.
        actual: Option<String>,
    },
    /// No plugin recognises the image. A raw image is only taken as one when it is named so.
    #[error(
        "the format is not recognised; name it with -f if it is raw, or load the plugin for it (see `instar plugins`)"
    )]
    Unrecognised,
    /// Plugins disagree.
    #[error("the image looks like {}: name the format with -f", .0.join(" and like "))]
    Ambiguous(Vec<String>),
    /// A plugin gave no answer.
    #[error(transparent)]
    Plugin(PluginFailure),
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and ")
}

impl IdentifyError {
    /// The code under which a commit fails for this reason.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::UnknownFormat { .. } | Self::ClaimedTwice { .. } => ErrorCode::PluginUnavailable,
            Self::NotThisFormat { .. } => ErrorCode::FormatMismatch,
            Self::Unrecognised | Self::Ambiguous(_) => ErrorCode::UnsupportedFormat,
            Self::Plugin(failure) => failure.code(),
        }
    }
}

impl Registry {
    /// Find out which format an image is of. A `hint` that the image does not match is refused, never believed.
    ///
    /// # Errors
    /// [`IdentifyError`] when no plugin, or no single one, can say what the image is.
    pub fn identify(&self, image: &dyn ImageRead, hint: Option<&str>) -> Result<Identified<'_>, IdentifyError> {
        let (plugin, looks_like) = match hint {
            Some(hint) => self.by_hint(image, hint)?,
            None => (self.by_content(image)?, None),
        };
        let facts = plugin.facts(ImageFiles::one(image)).map_err(IdentifyError::Plugin)?;
        Ok(Identified { plugin, facts, looks_like })
    }

    fn by_hint(&self, image: &dyn ImageRead, hint: &str) -> Result<(&Plugin, Option<String>), IdentifyError> {
        if let Some(libraries) = self.conflict(hint) {
            return Err(IdentifyError::ClaimedTwice { name: hint.to_owned(), libraries: libraries.to_vec() });
        }
        let plugin = self.by_format(hint).ok_or_else(|| IdentifyError::UnknownFormat { hint: hint.to_owned() })?;
        match plugin.probe(image).map_err(IdentifyError::Plugin)? {
            PROBE_NO => {
                let actual = self.by_content(image).ok().map(|other| other.name().to_owned());
                Err(IdentifyError::NotThisFormat { hint: plugin.name().to_owned(), actual })
            }
            PROBE_ANYTHING => {
                let looks_like = match self.by_content(image) {
                    Ok(other) => Some(other.name().to_owned()),
                    Err(IdentifyError::Ambiguous(names)) => names.into_iter().next(),
                    Err(IdentifyError::Unrecognised) => None,
                    // Not knowing what a file looks like is no reason to believe that it looks like nothing.
                    Err(error) => return Err(error),
                };
                Ok((plugin, looks_like))
            }
            _ => Ok((plugin, None)),
        }
    }

    /// The one plugin that recognises the image best.
    fn by_content(&self, image: &dyn ImageRead) -> Result<&Plugin, IdentifyError> {
        let mut best: Vec<&Plugin> = Vec::new();
        let mut best_score = PROBE_ANYTHING;
        let mut failure = None;
        for plugin in self.plugins() {
            match plugin.probe(image) {
                Ok(score) if score > best_score => {
                    best_score = score;
                    best = vec![plugin];
                }
                Ok(score) if score == best_score && !best.is_empty() => best.push(plugin),
                Ok(_) => {}
                Err(error) => failure = Some(error),
            }
        }
        match (best.as_slice(), failure) {
            (&[plugin], _) => Ok(plugin),
            ([], Some(failure)) => Err(IdentifyError::Plugin(failure)),
            ([], None) => Err(IdentifyError::Unrecognised),
            (several, _) => Err(IdentifyError::Ambiguous(several.iter().map(|p| p.name().to_owned()).collect())),
        }
    }
}
