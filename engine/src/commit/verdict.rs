//! The checks that can refuse a commit before a guest starts: the plugins' verdicts, and the sizes.

use super::repeated::Repeated;
use crate::error::Error;
use crate::escape::escape_path;
use crate::image::ChainImage;
use crate::operation::{ask, Grants, ImageSet};
use instar_guest_abi::{ErrorCode, MemberRole};
use instar_plugin_api::{Context, ImageFacts, Incoming, Role};
use std::path::PathBuf;

/// The images of a commit by their roles.
pub struct Parts<'s, 'r> {
    /// The overlay.
    pub overlay: &'s ChainImage<'r>,
    /// The layers between it and the backing, the top-most first.
    pub between: Vec<&'s ChainImage<'r>>,
    /// The image that is committed into.
    pub backing: &'s ChainImage<'r>,
    /// The images below that, nearest first.
    pub ancestors: Vec<&'s ChainImage<'r>>,
    /// Whether the overlay is emptied afterwards.
    pub empties: bool,
}

impl<'s, 'r> Parts<'s, 'r> {
    /// Sort the images of a set; `None` if it has no overlay or no target.
    #[must_use]
    pub fn of(images: &'s ImageSet<'r>) -> Option<Self> {
        let mut merged = images.of_role(|role| matches!(role, MemberRole::Read | MemberRole::Empty));
        Some(Self {
            overlay: merged.next()?,
            between: merged.collect(),
            backing: images.target.as_ref()?,
            ancestors: images.of_role(|role| role == MemberRole::Below).collect(),
            empties: images.of_role(|role| role == MemberRole::Empty).next().is_some(),
        })
    }

    /// The layers that are committed, the overlay first.
    pub fn merged(&self) -> impl Iterator<Item = &'s ChainImage<'r>> + '_ {
        std::iter::once(self.overlay).chain(self.between.iter().copied())
    }

    /// Ask each plugin for its verdict. Returns the maximum lengths of the files; `warnings` takes the plugins' other
    /// lines. The backing's disk grows to `grows_to` bytes, if at all.
    ///
    /// # Errors
    /// The first verdict that refuses.
    pub fn verdict(&self, grows_to: Option<u64>, warnings: &mut Vec<String>) -> Result<Grants, Error> {
        let mut ask = |image: &ChainImage<'_>, role: Role, context: Context<'_>| {
            let what = match role {
                Role::Read | Role::Empty => "be committed",
                Role::Write => "be committed into",
                Role::Below => "be read below a backing",
            };
            ask(image, role, what, &context, warnings)
        };
        let merged: Vec<&ChainImage<'_>> = self.merged().collect();
        // The image that is emptied may have to be repaired first, for which it may need more than it has.
        let mut emptied = 0;
        for (index, layer) in merged.iter().enumerate() {
            let parent = merged.get(index + 1).unwrap_or(&self.backing);
            let lowest = index + 1 == merged.len();
            let parent_identity_changes = lowest && layer.has_to_follow(self.backing);
            let context = Context { parent_identity_changes, ..Context::reading(Some(&parent.facts), true) };
            if index == 0 && self.empties {
                emptied = ask(layer, Role::Empty, context)?;
            } else {
                ask(layer, Role::Read, context)?;
                if let Some(virtual_size) = grows_to.filter(|_| lowest) {
                    // It stays above the backing as that will be: a format may demand that both have one size. Interrupted
                    // halfway, nothing could read the one through the other any more.
                    let grown = ImageFacts { virtual_size, ..parent.facts.clone() };
                    ask(layer, Role::Read, Context { parent: Some(&grown).into(), ..context })?;
                }
            }
        }
        let parent = self.ancestors.first().map(|parent| &parent.facts);
        // There is one layer at least.
        let incoming = Incoming::from_layers(merged.iter().map(|layer| &layer.facts));
        let context = incoming.map_or(Context::reading(parent, false), |incoming| Context::writing(parent, incoming));
        let target = ask(self.backing, Role::Write, context)?;
        let below: Vec<&ChainImage<'_>> = std::iter::once(self.backing).chain(self.ancestors.iter().copied()).collect();
        for (index, image) in below.iter().enumerate() {
            let parent = below.get(index + 1);
            // The backing itself is asked whether it goes with its parent.
            if index > 0 || parent.is_some() {
                ask(image, Role::Below, Context::reading(parent.map(|parent| &parent.facts), false))?;
            }
        }
        Ok(Grants { target: target.max(self.backing.facts.file_length), emptied, ..Grants::default() })
    }

    /// The virtual size in bytes to which the backing has to grow, if it has to and may.
    ///
    /// # Errors
    /// [`ErrorCode::OverlayLargerThanBacking`] if it has to, and may not.
    pub fn growth(&self, may_grow: bool) -> Result<Option<u64>, Error> {
        let (needed, size) = (self.overlay.facts.virtual_size, self.backing.facts.virtual_size);
        if needed <= size || may_grow {
            return Ok((needed > size).then_some(needed));
        }
        let advice = if self.backing.opened.block_device && self.backing.facts.cluster_size <= 1 {
            "enlarge the device first"
        } else {
            "give --resize-backing"
        };
        let clause = format!(
            "the overlay's virtual size of {needed} bytes exceeds backing virtual size of {size} bytes: {advice}"
        );
        Err(Error::image(&self.overlay.opened.path, ErrorCode::OverlayLargerThanBacking, clause))
    }

    /// The line about a backing that is recorded as raw and has the mark of another format. Its guest may have written
    /// that mark, so it is no reason to refuse; but a person may have mistaken a disk with a footer, or another file,
    /// for a raw one.
    #[must_use]
    pub fn unsure_mark(&self) -> Option<String> {
        let mark = self.backing.mark.as_ref().filter(|mark| mark.certain == self.backing.insisted)?;
        let (path, raw, other) = (escape_path(&self.backing.opened.path), self.backing.plugin.name(), &mark.format);
        if mark.certain {
            return Some(format!(
                "'{path}' has the mark of a {other} image, and nothing but -F {raw} says that it is none: if it is one, the \
                 commit destroys it"
            ));
        }
        Some(format!(
            "'{path}' is recorded as {raw}, and has a mark of a {other} image: if its guest wrote that, -F {raw} says so; if it \
             is a {other} image, the commit may overwrite the mark, and -F {other} keeps it"
        ))
    }

    /// Refuse a backing that is not believed to be raw, unless the commit may be the repetition of one that made it
    /// look so. Only its writes can prove that, and a dry run has none.
    ///
    /// # Errors
    /// [`ErrorCode::FormatMismatch`].
    pub fn refuse_doubt(&self, dry_run: bool) -> Result<(), Error> {
        let Some(doubt) = &self.backing.doubt else { return Ok(()) };
        // The first run has made it as long as it has to be.
        let fits = self.overlay.facts.virtual_size <= self.backing.facts.virtual_size;
        if fits && !dry_run && Repeated::new(&doubt.mark).is_some() {
            return Ok(());
        }
        Err(Error::image(&self.backing.opened.path, ErrorCode::FormatMismatch, &doubt.clause))
    }
}

/// The line about layers that are merged and stay, which is printed before that happens.
#[must_use]
pub fn become_stale(layers: &[PathBuf], dry_run: bool) -> Option<String> {
    let first = escape_path(layers.first()?);
    let (others, it) = match layers.len() - 1 {
        0 => (String::new(), "it"),
        others => (format!(" and {others} more of the layers that are merged"), "them"),
    };
    let verb = match (dry_run, layers.len()) {
        (true, _) => "would become",
        (false, 1) => "becomes",
        (false, _) => "become",
    };
    Some(format!(
        "'{first}'{others}: {verb} stale, because the image below changes: from now on use that image, and never commit {it}; \
         delete {it} together with the overlay, once no other image depends on {it}"
    ))
}
