//! The images that have the resized one as their backing, and the effect of the new size on them.
//!
//! An overlay that is larger than its backing reads zeroes past the backing's end. So if a backing shrinks, overlays
//! that are larger than its new size lose the data that they read there; the others read as before. If a backing grows,
//! its new part reads as zeroes, as it did in its overlays, so none reads other data. But some formats (VHD, VHDX, VDI)
//! require both to have one size, and refuse the chain afterwards. Only the overlays themselves record their backing,
//! so the engine looks for them beside the image and in the directories that the operator allows; it does not find
//! overlays elsewhere.

use crate::error::Error;
use crate::escape::escape_path;
use crate::image::{counted, ChainImage, ChildSearch};
use crate::operation::Opener;
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::{Context, ImageFacts, Role};
use std::path::Path;

/// Overlays that would read other data, or could not be read any more.
#[derive(Debug)]
pub(super) struct Overlays {
    names: Vec<String>,
}

impl Overlays {
    /// Look for overlays that change when `image`, which is above `below`, gets `size` bytes. `None` if there are none.
    ///
    /// # Errors
    /// [`ErrorCode::Interrupted`].
    pub(super) fn find(
        opener: &Opener<'_, '_>,
        image: &ChainImage<'_>,
        below: &[ChainImage<'_>],
        size: u64,
    ) -> Result<Option<Self>, Error> {
        let Opener { registry, session, gate, .. } = *opener;
        let known: Vec<&ChainImage<'_>> = std::iter::once(image).chain(below).collect();
        let roots = gate.roots();
        let search = ChildSearch { registry, roots, parents: &[image], known: &known, cancel: session.cancel() };
        let directories = roots.directories().iter().chain([&image.opened.directory]);
        let found = search.find(directories)?;
        if found.passed_over > 0 {
            let count = found.passed_over;
            session.note(|| format!("overlays of the image: files that could not be looked at: {count}"));
        }
        for directory in &found.unlisted {
            session.note(|| format!("overlays of the image: '{}' cannot be listed", escape_path(directory)));
        }
        let concerned = found.children.iter().filter(|child| is_concerned(registry, &child.facts, &image.facts, size));
        let names: Vec<String> = concerned.map(|child| format!("'{}'", escape_path(&child.path))).collect();
        Ok((!names.is_empty()).then_some(Self { names }))
    }

    /// The refusal of a resize that would damage overlays.
    pub(super) fn refusal(&self, image: &Path) -> Error {
        let (count, names) = counted(&self.names);
        let clause = format!(
            "is the backing of {count}, which its new size would damage: {names}; if they are needed, resize a copy of this \
             image instead, in a directory of its own; if not, use --ignore-overlays"
        );
        Error::image(image, ErrorCode::BackingShared, clause)
    }

    /// The warning of a resize that the operator insists on.
    pub(super) fn warning(&self, image: &Path, dry_run: bool) -> String {
        let ((count, names), image) = (counted(&self.names), escape_path(image));
        let damages = if dry_run { "would damage" } else { "damages" };
        format!("'{image}': is the backing of {count}, which its new size {damages}: {names}")
    }
}

/// Whether an overlay reads other data, or is refused, when its parent gets `size` bytes.
fn is_concerned(registry: &Registry, overlay: &ImageFacts, parent: &ImageFacts, size: u64) -> bool {
    if size < parent.virtual_size && overlay.virtual_size > size {
        return true;
    }
    let Some(plugin) = registry.by_format(&overlay.format) else { return false };
    let refused = |parent: &ImageFacts| {
        plugin.verdict(Role::Read, overlay, &Context::reading(Some(parent), false)).code != instar_guest_abi::ERROR_OK
    };
    refused(&ImageFacts { virtual_size: size, ..parent.clone() }) && !refused(parent)
}
