//! The siblings of an overlay: other images on what a commit changes.
//!
//! All images on a target read the committed data, and a guest that finds changed data below its own is a damaged
//! guest. With layers between, the images on those read the target as well. Only the siblings themselves record this,
//! so the engine looks for them beside the images and in the directories that the operator allows; it does not find
//! siblings elsewhere.

use crate::error::{Error, Role};
use crate::escape::escape_path;
use crate::image::{counted, ChainImage, Child, ChildSearch, Children};
use crate::operation::{Opener, Session};
use instar_guest_abi::ErrorCode;
use rustix::fs::Stat;
use std::path::{Path, PathBuf};

/// The siblings of an overlay.
#[derive(Debug)]
pub struct Siblings {
    /// The target.
    target: PathBuf,
    /// Their names, each with the layer below it, if that is not the target.
    names: Vec<String>,
}

impl Siblings {
    /// Look for siblings; `above` are the overlay and the layers between it and the `target`, the top-most first.
    /// Stale files do not count. `None` if there are none.
    ///
    /// # Errors
    /// [`ErrorCode::Interrupted`].
    pub fn find(
        opener: &Opener<'_, '_>,
        above: &[&ChainImage<'_>],
        target: &ChainImage<'_>,
        ancestors: &[ChainImage<'_>],
        is_stale: impl Fn(&Stat) -> bool,
    ) -> Result<Option<Self>, Error> {
        let Opener { registry, session, below, .. } = *opener;
        // The images on the overlay itself read afterwards what they read before.
        let changed: Vec<&ChainImage<'_>> = above.iter().skip(1).copied().chain([target]).collect();
        let known: Vec<&ChainImage<'_>> = above.iter().copied().chain([target]).chain(ancestors).collect();
        let roots = below.roots();
        let search = ChildSearch { registry, roots, parents: &changed, known: &known, cancel: session.cancel() };
        let beside = changed.iter().map(|image| &image.opened.directory);
        let found = search.find(roots.directories().iter().chain(beside))?;
        note(session, &found);
        let siblings = found.children.iter().filter(|child| !is_stale(child.stat()));
        let names: Vec<String> = siblings.map(|child| name(child, above)).collect();
        Ok((!names.is_empty()).then(|| Self { target: target.opened.path.clone(), names }))
    }

    /// The refusal of a commit that would damage siblings.
    #[must_use]
    pub fn refusal(&self) -> Error {
        let (count, names) = counted(&self.names);
        let clause = format!(
            "is the backing of {count}, which a commit into it would damage: {names}; if they are needed, give them a copy of \
             this one as their backing first, or move them, with a copy of it, to a directory of their own; if not, use \
             --ignore-siblings"
        );
        Error::image(&self.target, ErrorCode::BackingShared, clause).in_role(Role::Backing)
    }

    /// The warning of a commit that the operator insists on.
    #[must_use]
    pub fn warning(&self, dry_run: bool) -> String {
        let ((count, names), target) = (counted(&self.names), escape_path(&self.target));
        let damages = if dry_run { "would damage" } else { "damages" };
        format!("'{target}': is the backing of {count}, which a commit into it {damages}: {names}")
    }
}

/// A sibling for a person.
fn name(child: &Child, above: &[&ChainImage<'_>]) -> String {
    let quoted = |path: &Path| format!("'{}'", escape_path(path));
    let mut name = quoted(&child.path);
    if let Some(layer) = above.iter().find(|image| image.opened.identity == child.parent) {
        name += &format!(" (through {})", quoted(&layer.opened.path));
    }
    name
}

/// The part of the search that failed.
fn note(session: &Session, found: &Children) {
    if found.passed_over > 0 {
        let count = found.passed_over;
        session.note(|| format!("other images on the backing: files that could not be looked at: {count}"));
    }
    for directory in &found.unlisted {
        let path = escape_path(directory);
        session.note(|| format!("other images on the backing: '{path}' cannot be listed"));
    }
}
