//! May this image take its part in an operation? What headers and metadata can refuse is refused here.

use crate::facts::names;
use instar_plugin_api::{printable, Context, ErrorCode, ImageFacts, Incoming, Role, Verdict};
use instar_vhdx_format::{ALIGNMENT, BITMAP_BLOCK};

/// The verdict on `own`; see [`FormatPlugin::verdict`](instar_plugin_api::FormatPlugin::verdict).
pub fn give(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
    let parent = context.parent.into_option();
    let refused = parent.and_then(|parent| misfit(own, parent)).or_else(|| match role {
        Role::Read if context.below_changes => merge(own).or_else(|| stays(own, context.parent_identity_changes)),
        Role::Write | Role::Empty => merge(own),
        Role::Read | Role::Below => None,
    });
    if let Some(reason) = refused {
        return Verdict::refused(ErrorCode::UnsupportedFormat, reason);
    }
    match role {
        // Whether an image goes with its parent, the engine sees from their identities.
        Role::Read | Role::Below => Verdict::supported(0),
        // What the log has to do is done first, and the length that it records is whole MiB.
        Role::Empty => Verdict::supported(replayed(own).saturating_add(ALIGNMENT)),
        Role::Write => of_target(own, &context.arriving(own)),
    }
}

/// How long the file is once the log is replayed, in bytes.
fn replayed(own: &ImageFacts) -> u64 {
    own.number(names::LENGTH).unwrap_or(0).max(own.file_length)
}

/// Child and parent have one size, and one size of sectors (2.6.2.4).
fn misfit(own: &ImageFacts, parent: &ImageFacts) -> Option<String> {
    // Of another format nothing is said.
    let of_parent = parent.number(names::LOGICAL)?;
    let of_own = own.number(names::LOGICAL)?;
    if of_own != of_parent {
        return Some(format!("its logical sectors have {of_own} bytes, and its parent's {of_parent}"));
    }
    let (size, other) = (own.virtual_size, parent.virtual_size);
    (size != other).then(|| format!("its disk has {size} bytes, and its parent's {other}: a child has to be as large"))
}

/// Metadata that a merge would have to carry over (2.6.1.2).
fn merge(own: &ImageFacts) -> Option<String> {
    let id = own.text(names::FOREIGN)?;
    Some(format!("its metadata item {} belongs to the disk, and nobody here can merge it", printable(id)))
}

/// What keeps an image that stays as it is from going with a parent whose identity changes.
fn stays(own: &ImageFacts, parent_identity_changes: bool) -> Option<String> {
    let by_header = own.flag(names::BY_HEADER) && parent_identity_changes;
    by_header.then(|| {
        if own.dirty {
            "its log is to be replayed before it can go with a parent that has changed: commit this layer by itself, \
             without -d"
                .to_owned()
        } else {
            "its parent locator cannot be changed in its place: commit this layer by itself, without -d, which rewrites \
             the locator by the log"
                .to_owned()
        }
    })
}

/// What a person should know of an image.
pub fn notes(own: &ImageFacts) -> Vec<String> {
    let refused = merge(own).map(|reason| format!("cannot be committed: {reason}"));
    let dirty = own.dirty.then(|| {
        "its log is to be replayed: it was not closed. It is read through the log; whatever writes into it replays it first"
            .to_owned()
    });
    let announced = own
        .parent_announced
        .then(|| "a commit from it into its parent was interrupted: run it again to finish it".to_owned());
    let damaged = own
        .text(names::DAMAGED)
        .map(|which| format!("of {}, one is damaged: a commit into it, or from it, makes it whole", printable(which)));
    refused.into_iter().chain(dirty).chain(announced).chain(damaged).map(line).collect()
}

/// A note as long as notes may be, in bytes.
fn line(mut text: String) -> String {
    const MOST: usize = 300;
    let end = (0..=MOST.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    text.truncate(end);
    text
}

fn of_target(own: &ImageFacts, incoming: &Incoming) -> Verdict {
    match longest(own, incoming) {
        Some(length) => Verdict::supported(length),
        None => Verdict::refused(ErrorCode::UnsupportedFormat, "the image would become longer than 2^63 bytes"),
    }
}

/// An upper bound of how long the file can become, in bytes; `None` beyond 2^63: as many blocks as may arrive, one more, for
/// the last that the file has may be cut; a sector bitmap block for each chunk, which has 16 blocks at least; a table that is
/// moved for a disk that grows, with an entry for each block and each bitmap.
fn longest(own: &ImageFacts, incoming: &Incoming) -> Option<u64> {
    let size = own.virtual_size.max(incoming.virtual_size).checked_next_multiple_of(4096)?;
    let blocks = incoming.units(own.cluster_size).checked_add(1)?;
    let bitmaps = size.div_ceil(own.cluster_size).div_ceil(16).min(blocks).checked_mul(BITMAP_BLOCK)?;
    let moved = if size > own.virtual_size { size.div_ceil(own.cluster_size).checked_mul(9)? } else { 0 };
    let new = blocks.checked_mul(own.cluster_size)?.checked_add(bitmaps)?.checked_add(moved)?;
    let length = replayed(own).checked_add(new)?.checked_add(2 * ALIGNMENT)?;
    Some(length).filter(|&length| length <= i64::MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_plugin_api::Feature;

    fn image(size: u64) -> ImageFacts {
        let mut facts = ImageFacts::new("vhdx", size, 2 << 20, 10 << 20).with_clusters_at_most(5);
        facts.identity = vec![1; 16].into();
        facts.features.push(Feature::number(names::LOGICAL, 512, false));
        facts
    }

    fn write(own: &ImageFacts, other: &ImageFacts) -> Verdict {
        match Incoming::from_layers([other]) {
            Some(incoming) => give(Role::Write, own, &Context::writing(None, incoming)),
            None => Verdict::refused(ErrorCode::NoBacking, ""),
        }
    }

    #[test]
    fn a_child_is_as_large_as_its_parent() {
        let (small, large) = (image(1 << 30), image(2 << 30));
        let mut coarse = ImageFacts::new("vhdx", 1 << 30, 2 << 20, 10 << 20);
        coarse.features.push(Feature::number(names::LOGICAL, 4096, false));
        for role in [Role::Read, Role::Empty, Role::Below] {
            for (own, parent, words) in
                [(&large, &small, "as large"), (&small, &large, "as large"), (&small, &coarse, "logical sectors")]
            {
                assert!(give(role, own, &Context::reading(Some(parent), false)).reason.contains(words));
            }
            assert_eq!(give(role, &small, &Context::reading(Some(&small), false)).code, 0);
            let raw = ImageFacts::new("raw", 1 << 20, 0, 1 << 20);
            assert_eq!(give(role, &large, &Context::reading(Some(&raw), true)).code, 0);
        }
    }

    #[test]
    fn an_image_that_stays_has_to_be_able_to_follow() {
        let parent = image(1 << 30);
        let mut own = image(1 << 30);
        own.parent_identity = vec![1; 16].into();
        let kept = |own: &ImageFacts, parent_identity_changes| {
            let context = Context { parent_identity_changes, ..Context::reading(Some(&parent), true) };
            give(Role::Read, own, &context)
        };
        assert_eq!(kept(&own, true).code, 0);
        own.features.push(Feature::flag(names::BY_HEADER, true, false));
        assert!(kept(&own, true).reason.contains("cannot be changed in its place"));
        assert_eq!(kept(&own, false).code, 0);
        own.dirty = true;
        assert!(kept(&own, true).reason.contains("log is to be replayed"));
        assert_eq!(give(Role::Empty, &own, &Context::reading(Some(&parent), true)).code, 0);
        assert!(notes(&own)[0].contains("log is to be replayed"));
        own.parent_announced = true;
        assert!(notes(&own)[1].contains("interrupted"));
    }

    #[test]
    fn metadata_that_nobody_can_merge_is_named() {
        let mut own = image(1 << 30);
        own.features.push(Feature::text(names::FOREIGN, "0123", false));
        assert!(write(&own, &own).reason.contains("item 0123"));
        let asked = |role, changes| give(role, &own, &Context::reading(None, changes));
        assert!(asked(Role::Empty, true).reason.contains("item 0123"));
        assert!(asked(Role::Read, true).reason.contains("item 0123"));
        assert_eq!((asked(Role::Read, false).code, asked(Role::Below, true).code), (0, 0));
        assert!(notes(&own)[0].contains("cannot be committed"));
    }

    #[test]
    fn the_bound_covers_what_arrives() {
        let raw = ImageFacts::new("raw", 1 << 30, 0, 1 << 30);
        let all = write(&image(1 << 30), &raw).max_length;
        assert!(all > (10 << 20) + (1 << 30) + (32 << 20), "{all}");
        let few = write(&image(1 << 30), &image(1 << 30)).max_length;
        assert!((20 << 20..40 << 20).contains(&few), "{few}");
        let larger = ImageFacts::new("raw", 64 << 40, 0, 1 << 30);
        assert!(write(&image(1 << 30), &larger).max_length > (64 << 40) + (9 << 25));
        let mut pending = image(1 << 30);
        pending.features.push(Feature::number(names::LENGTH, 50 << 20, false));
        assert!(write(&pending, &image(1 << 30)).max_length > 50 << 20);
        assert!(give(Role::Empty, &pending, &Context::reading(None, true)).max_length > 50 << 20);
    }
}
