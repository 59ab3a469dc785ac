//! The children of an overlay: images that record its name, and that could not be read once a command removes it.

use crate::error::{Error, Role};
use crate::escape::escape_path;
use crate::image::{counted, ChainImage, ChildSearch};
use crate::operation::Opener;
use instar_guest_abi::ErrorCode;

/// Refuse an overlay that other images name, except for those that are relinked; `remedy` says what to do about them.
/// The search covers the same directories as that for [siblings].
///
/// [siblings]: super::siblings
///
/// # Errors
/// [`ErrorCode::BackingShared`], [`ErrorCode::Interrupted`].
pub fn refuse_children(
    opener: &Opener<'_, '_>,
    chain: &[&ChainImage<'_>],
    relinked: &[ChainImage<'_>],
    remedy: &str,
) -> Result<(), Error> {
    let Opener { registry, session, below, named, .. } = *opener;
    let Some(&overlay) = chain.first() else { return Ok(()) };
    let known: Vec<&ChainImage<'_>> = chain.iter().copied().chain(relinked).collect();
    let (roots, parents) = (below.roots(), [overlay]);
    let search = ChildSearch { registry, roots, parents: &parents, known: &known, cancel: session.cancel() };
    let named = named.child_directories.iter().filter_map(|directory| directory.found.as_ref().ok());
    let beside = chain.iter().map(|image| &image.opened.directory);
    let found = search.find(roots.directories().iter().chain(named).chain(beside))?;
    if found.passed_over > 0 {
        session.note(|| format!("images on the overlay: files that could not be looked at: {}", found.passed_over));
    }
    let names: Vec<String> = found.children.iter().map(|child| format!("'{}'", escape_path(&child.path))).collect();
    if names.is_empty() {
        return Ok(());
    }
    let (count, names) = counted(&names);
    let clause = format!("is the backing of {count}, which could not be read without it: {names}; {remedy}");
    Err(Error::image(&overlay.opened.path, ErrorCode::BackingShared, clause).in_role(Role::Overlay))
}
