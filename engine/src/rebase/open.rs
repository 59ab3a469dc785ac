//! The images below an image that gets another parent: the present ones and the future ones.

use crate::create::plugin_of;
use crate::error::{Error, Role};
use crate::escape::{escape, escape_path};
use crate::image::{
    check_parents, file_name, parent_is_unrecorded, Access, ChainImage, Descent, NamedFile, OpenedFile, RecordedRole,
};
use crate::lookup::Identity;
use crate::operation::Opener;
use instar_guest_abi::{ErrorCode, MAX_CHAIN_DEVICES};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Refuse a parent's name that leads to no file: its content cannot be compared.
///
/// # Errors
/// [`ErrorCode::OpenFailed`].
pub fn check_name(name: &str, unsafe_mode: bool) -> Result<(), Error> {
    if unsafe_mode || file_name(name.as_bytes()).is_ok() {
        return Ok(());
    }
    let text = format!("'{}' is not the name of a file: only files can be looked at (or use -u)", escape(name));
    Err(Error::new(ErrorCode::OpenFailed, text))
}

/// The file to which the new parent's name leads from the image; `None` if the name is not a file's.
#[must_use]
pub fn named_parent(image: &NamedFile, name: &str) -> Option<NamedFile> {
    let found = file_name(name.as_bytes()).ok()?;
    let path = Path::new(std::ffi::OsStr::from_bytes(&found.path));
    Some(if found.from_working_directory { NamedFile::new(path) } else { NamedFile::beside(image, path) })
}

/// The images below the image that gets another parent.
#[derive(Debug, Default)]
pub struct Below<'r> {
    /// The present ones, nearest first.
    pub old: Vec<ChainImage<'r>>,
    /// The future ones, nearest first, without those that are below it already.
    pub new: Vec<ChainImage<'r>>,
    /// The index in `old` of the first image that stays below it, if any does.
    pub shared: Option<usize>,
}

impl<'r> Below<'r> {
    /// Open both.
    ///
    /// # Errors
    /// Errors of opening, locking and probing; [`ErrorCode::ChainLoop`] if the new parent is the image, or backed by
    /// it.
    pub fn open(opener: &Opener<'r, '_>, image: &ChainImage<'r>, format: Option<&str>) -> Result<Self, Error> {
        let mut descent = Descent::new(
            opener.registry,
            opener.below,
            opener.named.image.path(),
            MAX_CHAIN_DEVICES - 1,
            opener.session.cancel(),
        );
        let old = descent.open_below(image, Access::ReadOnly).map_err(|error| unreadable(error, image))?;
        let chain: Vec<&ChainImage<'_>> = std::iter::once(image).chain(&old).collect();
        check_parents(&chain).map_err(|error| unreadable(error, image))?;
        let mut below = Self { old, ..Self::default() };
        if let (Some(base), Some(format)) = (&opener.named.base, format) {
            below.open_new(opener, image, base, format)?;
        }
        Ok(below)
    }

    fn open_new(
        &mut self,
        opener: &Opener<'r, '_>,
        image: &ChainImage<'r>,
        base: &NamedFile,
        format: &str,
    ) -> Result<(), Error> {
        plugin_of(opener.registry, format)?;
        let opened = open_base(base, image)?;
        refuse_itself(image, opened.identity)?;
        self.shared = self.position(opened.identity, &opened, Some(format));
        if self.shared.is_some() {
            return Ok(());
        }
        let first = opened.lock(Access::ReadOnly)?.identify_as(opener.registry, Some(format), "-F")?;
        let room = MAX_CHAIN_DEVICES.saturating_sub(self.old.len().saturating_add(2));
        let mut descent = Descent::new(opener.registry, opener.below, base.path(), room, opener.session.cancel());
        descent.passed(first.opened.identity);
        self.new.push(first);
        while let Some(above) = self.new.last() {
            let Some(located) = descent.next(above, RecordedRole::Ancestor, Access::ReadOnly, None)? else { break };
            if located.identity() == image.opened.identity {
                return Err(is_above(image, &self.new));
            }
            let next = descent.open(above, &located, RecordedRole::Ancestor, Access::ReadOnly)?;
            let same = self.position(next.opened.identity, &next.opened, Some(next.facts.format.as_str()));
            if same.is_some() {
                self.shared = same;
                break;
            }
            self.new.push(next);
        }
        let rest = self.shared.and_then(|from| self.old.get(from..)).unwrap_or_default();
        check_parents(&self.new.iter().chain(rest).collect::<Vec<_>>())
    }

    /// The index of an image in the present chain that is this file, of this format, with names that begin at the same
    /// directory, so that the images below it are the same, too.
    fn position(&self, identity: Identity, opened: &OpenedFile, format: Option<&str>) -> Option<usize> {
        self.old.iter().position(|image| {
            let same =
                image.opened.identity == identity && image.opened.directory.identity() == opened.directory.identity();
            same && format.is_none_or(|format| image.plugin.name() == format || image.facts.format == format)
        })
    }

    /// The whole new chain.
    pub fn after(&self) -> impl Iterator<Item = &ChainImage<'r>> {
        self.new.iter().chain(self.shared.and_then(|from| self.old.get(from..)).unwrap_or_default())
    }
}

/// The new parent for a rebase that compares nothing, if it can be opened.
///
/// # Errors
/// [`ErrorCode::ChainLoop`] if it is the image, or backed by it; [`ErrorCode::FormatMismatch`] and the like if it
/// exists, but contradicts the request.
pub fn open_unchecked<'r>(
    opener: &Opener<'r, '_>,
    image: &ChainImage<'r>,
    format: &str,
) -> Result<Option<ChainImage<'r>>, Error> {
    plugin_of(opener.registry, format)?;
    let Some(base) = &opener.named.base else { return Ok(None) };
    let opened = match base.open(Access::Shared, ErrorCode::BackingNotFound) {
        // Its present content must not be revealed.
        Err(error) if error.code == ErrorCode::RecoveryNeeded => return Err(error.in_role(Role::Backing)),
        Err(_) => return Ok(None),
        Ok(opened) => opened,
    };
    refuse_itself(image, opened.identity)?;
    let Ok(first) = opened.identify_as(opener.registry, Some(format), "-F") else { return Ok(None) };
    let mut descent =
        Descent::new(opener.registry, opener.below, base.path(), MAX_CHAIN_DEVICES - 1, opener.session.cancel());
    descent.passed(first.opened.identity);
    let mut chain = vec![first];
    while let Some(above) = chain.last() {
        // A name that cannot be followed is no obstacle.
        let Ok(Some(located)) = descent.next(above, RecordedRole::Ancestor, Access::Shared, None) else { break };
        if located.identity() == image.opened.identity {
            return Err(is_above(image, &chain));
        }
        match descent.open(above, &located, RecordedRole::Ancestor, Access::Shared) {
            Err(error) if error.code == ErrorCode::RecoveryNeeded => return Err(error.in_role(Role::Ancestor)),
            Err(_) => break,
            Ok(next) => chain.push(next),
        }
    }
    Ok(chain.into_iter().next())
}

fn open_base(base: &NamedFile, image: &ChainImage<'_>) -> Result<OpenedFile, Error> {
    base.open(Access::ReadOnly, ErrorCode::BackingNotFound).map_err(|error| match error.code {
        ErrorCode::BackingNotFound => {
            let later = if image.facts.parent_identity.is_empty() {
                "to record the name of a file that will be there later, use -u"
            } else {
                "the image records its parent's identity, which only the parent can tell: put it there first"
            };
            let clause = format!("does not exist (a relative name begins at the image's directory); {later}");
            Error::image(base.path(), error.code, clause).in_role(Role::Backing)
        }
        _ => error,
    })
}

/// The refusal of an image whose format has no place for a parent's name.
///
/// # Errors
/// [`ErrorCode::UnsupportedFormat`].
pub fn refuse_unrecorded(image: &ChainImage<'_>) -> Result<(), Error> {
    if !parent_is_unrecorded(&image.facts) {
        return Ok(());
    }
    let clause = "records nothing of a parent, as its format has no place for that: there is nothing to change";
    Err(Error::image(&image.opened.path, ErrorCode::UnsupportedFormat, clause))
}

fn refuse_itself(image: &ChainImage<'_>, identity: Identity) -> Result<(), Error> {
    if image.all_files().all(|own| own.identity != identity) {
        return Ok(());
    }
    let clause = "cannot be backed by itself: name another image with -b";
    Err(Error::image(&image.opened.path, ErrorCode::ChainLoop, clause))
}

/// The refusal of a parent that has the image in its own chain.
fn is_above(image: &ChainImage<'_>, chain: &[ChainImage<'_>]) -> Error {
    let by = chain.first().map(|first| escape_path(&first.opened.path)).unwrap_or_default();
    let clause =
        format!("is what '{by}' is backed by, so that the chain would lead back to itself: name another image with -b");
    Error::image(&image.opened.path, ErrorCode::ChainLoop, clause)
}

/// The error for images below the image that cannot be read now.
fn unreadable(error: Error, image: &ChainImage<'_>) -> Error {
    if matches!(error.code, ErrorCode::ImageInUse | ErrorCode::Interrupted | ErrorCode::ChainTooDeep) {
        return error;
    }
    let path = error.path().map_or_else(|| image.opened.path.clone(), Path::to_owned);
    let message = format!(
        "{}; what '{}' reads there cannot be kept without it: put it back, or, if the new backing file is known to hold the \
         same, use -u",
        error.message,
        escape_path(&image.opened.path)
    );
    Error::new(error.code, message).at_path(&path).in_role(Role::Ancestor)
}
