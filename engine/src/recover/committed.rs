//! What a commit took its data from is looked at before its log is applied. As long as that is what it was, it holds all that the log
//! takes out of the image again. If it is something else, or gone, another commit may have finished meanwhile, of a program that does
//! not see the log: an overlay that it emptied, or removed, holds nothing any more, and the image alone has the data.
//!
//! Neither proves that the data would be lost: an overlay can be moved, or a virtual machine can write to it. But a refusal loses
//! nothing, and the operator can insist.

use super::Found;
use crate::error::{reason, Error};
use crate::escape::shell_path;
use crate::image::{Access, OpenedFile, UndoDirectory};
use crate::undo::{sources, Source};
use instar_guest_abi::ErrorCode;
use std::borrow::Cow;

/// Why a source is not what it was, in one clause, if it is not.
fn difference(source: &Source, undo: Option<&UndoDirectory>) -> Option<Cow<'static, str>> {
    let opened = match OpenedFile::named(&source.path, Access::ReadOnly, ErrorCode::ImageNotFound) {
        Ok(opened) => opened,
        Err(error) if error.code == ErrorCode::ImageNotFound => return Some("is gone".into()),
        Err(_) => return Some("cannot be opened".into()),
    };
    let undo = undo.filter(|_| opened.block_device);
    let subject = undo.and_then(|undo| undo.identify(&opened).ok()).map_or([0; 32], |identity| identity.digest);
    match Source::look(opened.file.file(), &source.path, opened.length(), subject) {
        Ok(found) => source.difference(&found).map(Cow::Borrowed),
        Err(error) => Some(format!("cannot be read ({})", reason(&error)).into()),
    }
}

/// Refuse an image whose commit took its data from something that is not what it was. Of a log that is not sound, nothing is said.
///
/// # Errors
/// [`ErrorCode::RecoveryNeeded`].
pub(super) fn refuse_committed_since(
    image: &OpenedFile,
    found: &Found,
    undo: Option<&UndoDirectory>,
) -> Result<(), Error> {
    let sources = sources(&found.file).unwrap_or_default();
    let changed = sources.iter().find_map(|source| Some((&source.path, difference(source, undo)?)));
    let Some((path, why)) = changed else { return Ok(()) };
    let path = shell_path(path);
    let clause = format!(
        "has the undo log of a commit from {path}, which {why}: another commit may have moved its data into the image meanwhile, and \
         the undo log would delete the only copy. If such a commit has ended, the image is as it should be: remove the log, `rm {}`. If \
         {path}, or a copy of it, still holds the data, --force gives the image back what it was",
        shell_path(&found.path)
    );
    Err(Error::image(&image.path, ErrorCode::RecoveryNeeded, clause))
}
