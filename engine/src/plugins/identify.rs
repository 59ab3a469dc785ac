//! Identifying the format of an image.

use super::{Foreign, ImageFiles, ImageRead, Plugin, PluginFailure, Registry};
use crate::escape::escape;
use crate::nearest::nearest;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::{ImageFacts, PROBE_ANYTHING, PROBE_LIKELY, PROBE_NO};
use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

/// An image whose format is known.
#[derive(Debug)]
pub struct Identified<'r> {
    /// The plugin of the format.
    pub plugin: &'r Plugin,
    /// What the header says.
    pub facts: ImageFacts,
    /// For a format without a signature (raw): the signature of another format in the file. A file with a certain one must not
    /// be written just because an image calls it raw.
    pub mark: Option<Mark>,
}

/// The signature of a format in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The format.
    pub format: String,
    /// Whether the signature cannot occur in other files by chance: [`PROBE_LIKELY`] is not certain.
    pub certain: bool,
    /// Its place: the bytes that its plugin read to recognize it.
    pub bytes: Range<u64>,
    /// Size in bytes of the clusters of such an image, of which the first holds its header; 0 if it is none.
    pub cluster_size: u64,
}

/// The reason why the format of an image is unknown. The text does not name the image, which the caller adds.
#[derive(Debug, thiserror::Error)]
pub enum IdentifyError {
    /// No plugin has the format that was named.
    #[error("unknown format '{}': {}{} (see `instar plugins`)", escape(.hint), nearby(.hint, .known), loaded(.known))]
    UnknownFormat {
        /// The format that was named.
        hint: String,
        /// The formats that have a plugin.
        known: Vec<String>,
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
    #[error(
        "does not begin like the {hint} image that it is said to be{}", 
        .actual.as_ref().map_or_else(
            || ": if it used to be one, its header is damaged: restore it, and do not call it raw".to_owned(),
            |name| format!(", but like a {name} image: name its real format"),
        )
    )]
    NotThisFormat {
        /// The format that was named.
        hint: String,
        /// The format that it looks like instead.
        actual: Option<String>,
    },
    /// No plugin recognizes the image. A raw image is only taken as one when it is named so.
    #[error("begins like no known format ({})", .known.join(", "))]
    Unrecognised {
        /// The formats that have a mark.
        known: Vec<String>,
    },
    /// There is no plugin that has a mark to look for.
    #[error(
        "its format is not known, because no plugin of a format with a mark is loaded{}",
        if *.skipped == 0 { String::new() } else { format!(": {} could not be used", .skipped) }
    )]
    NoPlugins {
        /// How many libraries and directories were passed over.
        skipped: usize,
    },
    /// No plugin recognizes the file, which is something else that is known.
    #[error("{0}")]
    Foreign(Foreign),
    /// The image is a LUKS container.
    #[error("is encrypted with LUKS, which is not supported: open it with `cryptsetup open FILE NAME`, and name /dev/mapper/NAME, which is raw, in its place")]
    Luks,
    /// Plugins disagree.
    #[error("the image looks like {}: name the format with -f", .0.join(" and like "))]
    Ambiguous(Vec<String>),
    /// A plugin gave no answer.
    #[error(transparent)]
    Plugin(PluginFailure),
}

fn loaded(formats: &[String]) -> String {
    if formats.is_empty() {
        return "no plugin is loaded".to_owned();
    }
    format!("the plugins that are loaded are for {}", formats.join(", "))
}

/// The format that was probably meant.
fn nearby(hint: &str, known: &[String]) -> String {
    let near = nearest(hint, known.iter().map(String::as_str));
    near.map(|near| format!("the nearest one is {near}; ")).unwrap_or_default()
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and ")
}

/// Another possible fault of a file that no plugin recognizes.
pub const DAMAGED: &str = "if it used to be one of them, its header is damaged: restore it, and do not call it raw";

impl IdentifyError {
    /// Return the code under which a commit fails for this reason.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::UnknownFormat { .. } | Self::ClaimedTwice { .. } | Self::NoPlugins { .. } => {
                ErrorCode::PluginUnavailable
            }
            Self::NotThisFormat { .. } => ErrorCode::FormatMismatch,
            Self::Unrecognised { .. } | Self::Foreign(_) | Self::Ambiguous(_) => ErrorCode::UnsupportedFormat,
            Self::Luks => ErrorCode::LuksUnsupported,
            Self::Plugin(failure) => failure.code(),
        }
    }
}

impl Registry {
    /// Identify the format of an image. Refuses a `hint` that the image does not match.
    ///
    /// # Errors
    /// [`IdentifyError`] when no plugin, or no single one, can say what the image is.
    pub fn identify(&self, image: &dyn ImageRead, hint: Option<&str>) -> Result<Identified<'_>, IdentifyError> {
        let (plugin, mark) = match hint {
            Some(hint) => self.by_hint(image, hint)?,
            None => (self.by_content(image)?.0, None),
        };
        let facts = plugin.facts(ImageFiles::one(image)).map_err(IdentifyError::Plugin)?;
        Ok(Identified { plugin, facts, mark })
    }

    /// Return the signature of a format in a file; of several plugins that claim it, that of the surest.
    ///
    /// # Errors
    /// When it is not known: a plugin gave no answer. Not knowing what a file looks like is no reason to believe that it
    /// looks like nothing.
    pub fn mark(&self, image: &dyn ImageRead) -> Result<Option<Mark>, IdentifyError> {
        let (plugin, score) = match self.by_content(image) {
            Ok(found) => found,
            Err(
                IdentifyError::Unrecognised { .. }
                | IdentifyError::NoPlugins { .. }
                | IdentifyError::Luks
                | IdentifyError::Foreign(_),
            ) => return Ok(None),
            Err(IdentifyError::Ambiguous(names)) => {
                let format = names.into_iter().next().unwrap_or_default();
                return Ok(Some(Mark { format, certain: true, bytes: 0..image.length(), cluster_size: 0 }));
            }
            Err(error) => return Err(error),
        };
        let seen = Seen { image, bytes: Cell::new((u64::MAX, 0)) };
        plugin.probe(&seen).map_err(IdentifyError::Plugin)?;
        let (start, end) = seen.bytes.get();
        let bytes = start.min(end)..end.min(image.length());
        let cluster_size = plugin.facts(ImageFiles::one(image)).map_or(0, |facts| facts.cluster_size);
        Ok(Some(Mark { format: plugin.name().to_owned(), certain: score > PROBE_LIKELY, bytes, cluster_size }))
    }

    /// No plugin has the format that was named.
    #[must_use]
    pub fn unknown_format(&self, hint: &str) -> IdentifyError {
        let mut known: Vec<String> = self.plugins().iter().map(|plugin| plugin.name().to_owned()).collect();
        known.sort_unstable();
        IdentifyError::UnknownFormat { hint: hint.to_owned(), known }
    }

    fn by_hint(&self, image: &dyn ImageRead, hint: &str) -> Result<(&Plugin, Option<Mark>), IdentifyError> {
        if let Some(libraries) = self.conflict(hint) {
            return Err(IdentifyError::ClaimedTwice { name: hint.to_owned(), libraries: libraries.to_vec() });
        }
        let Some(plugin) = self.by_format(hint) else {
            // QEMU's name for it.
            return Err(if hint == "luks" { IdentifyError::Luks } else { self.unknown_format(hint) });
        };
        match plugin.probe(image).map_err(IdentifyError::Plugin)? {
            PROBE_NO => match self.by_content(image) {
                Err(error @ (IdentifyError::Luks | IdentifyError::Foreign(Foreign::Image(..) | Foreign::Odd(_)))) => {
                    Err(error)
                }
                other => {
                    let actual = other.ok().map(|(other, _)| other.name().to_owned());
                    Err(IdentifyError::NotThisFormat { hint: plugin.name().to_owned(), actual })
                }
            },
            PROBE_ANYTHING => Ok((plugin, self.mark(image)?)),
            _ => Ok((plugin, None)),
        }
    }

    /// The names that an image records of its other files; none where its content says nothing of any.
    #[must_use]
    pub fn recorded_files(&self, image: &dyn ImageRead) -> Vec<Vec<u8>> {
        let files = self.by_content(image).ok().and_then(|(plugin, _)| plugin.files(image).ok());
        files.unwrap_or_default().into_iter().map(|file| file.name.to_vec()).collect()
    }

    /// The one plugin that recognizes the image best, and its score.
    fn by_content(&self, image: &dyn ImageRead) -> Result<(&Plugin, u32), IdentifyError> {
        let mut best: Vec<&Plugin> = Vec::new();
        let mut best_score = PROBE_ANYTHING;
        let mut failure = None;
        let mut known = Vec::new();
        for plugin in self.plugins() {
            match plugin.probe(image) {
                Ok(score) if score > best_score => {
                    best_score = score;
                    best = vec![plugin];
                }
                Ok(score) if score == best_score && !best.is_empty() => best.push(plugin),
                Ok(PROBE_NO) => known.push(plugin.name().to_owned()),
                Ok(_) => {}
                Err(error) => failure = Some(error),
            }
        }
        match (best.as_slice(), failure) {
            (&[plugin], _) => Ok((plugin, best_score)),
            ([], Some(failure)) => Err(IdentifyError::Plugin(failure)),
            ([], None) if is_luks(image) => Err(IdentifyError::Luks),
            ([], None) if known.is_empty() => Err(IdentifyError::NoPlugins { skipped: self.skipped().len() }),
            ([], None) => Err(match Foreign::of(image) {
                // It was asked.
                Some(Foreign::Image(people, name)) if self.by_format(name).is_some() => {
                    IdentifyError::Foreign(Foreign::Odd(people))
                }
                Some(foreign) => IdentifyError::Foreign(foreign),
                None => {
                    known.sort_unstable();
                    IdentifyError::Unrecognised { known }
                }
            }),
            (several, _) => Err(IdentifyError::Ambiguous(several.iter().map(|p| p.name().to_owned()).collect())),
        }
    }
}

/// The first bytes of a LUKS container, versions 1 and 2 (the LUKS on-disk format specifications, "magic").
const LUKS: [u8; 6] = *b"LUKS\xba\xbe";

/// Whether an image is a LUKS container: no format, but what is wrong with it can be said.
fn is_luks(image: &dyn ImageRead) -> bool {
    let mut start = [0; LUKS.len()];
    image.read_at(0, &mut start).is_ok_and(|length| length == start.len()) && start == LUKS
}

/// An image of which the bytes that are read are noted: from the first to the last.
struct Seen<'i> {
    image: &'i dyn ImageRead,
    bytes: Cell<(u64, u64)>,
}

impl ImageRead for Seen<'_> {
    fn length(&self) -> u64 {
        self.image.length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let (start, end) = self.bytes.get();
        let last = offset.saturating_add(buffer.len() as u64);
        self.bytes.set((start.min(offset), end.max(last)));
        self.image.read_at(offset, buffer)
    }
}
