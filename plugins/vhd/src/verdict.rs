//! May this image take its part in an operation? What footers and header can refuse is refused here.

use crate::facts::{is_larger, names};
use instar_plugin_api::{printable, Context, ErrorCode, ImageFacts, Incoming, Role, Verdict};
use instar_vhd_format::{DATA_ALIGNMENT, FOOTER_BYTES, SECTOR};

/// The verdict on `own`; see [`FormatPlugin::verdict`](instar_plugin_api::FormatPlugin::verdict).
pub fn give(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
    if let Some((code, reason)) = refusal(own) {
        return Verdict::refused(code, reason);
    }
    if let Some(parent) = context.parent.into_option().filter(|parent| is_larger(own, parent)) {
        let reason = format!(
            "it says that its disk has {} bytes, and its parent's has {}: no program that is known makes a child larger than \
             its parent",
            own.number(names::CURRENT_SIZE).unwrap_or(own.virtual_size),
            parent.number(names::CURRENT_SIZE).unwrap_or(parent.virtual_size),
        );
        return Verdict::refused(ErrorCode::UnsupportedFormat, reason);
    }
    match role {
        // Whether an image goes with its parent, the engine sees from their identities.
        Role::Read | Role::Below => Verdict::supported(0),
        // A footer at the end that is missing is written again.
        Role::Empty => Verdict::supported(own.file_length.saturating_add(2 * FOOTER_BYTES as u64)),
        Role::Write => of_target(own, &context.arriving(own)),
    }
}

/// What keeps an image from taking any part.
fn refusal(own: &ImageFacts) -> Option<(ErrorCode, String)> {
    if own.encrypted {
        let reason = "encryption is not supported: convert it to an image without encryption";
        return Some((ErrorCode::LuksUnsupported, reason.to_owned()));
    }
    own.text(names::UNSUPPORTED).map(|reason| (ErrorCode::UnsupportedFormat, printable(reason)))
}

/// What a person should know of an image.
pub fn notes(own: &ImageFacts) -> Vec<String> {
    let refused = refusal(own).map(|(_, reason)| format!("cannot be committed: {reason}"));
    let current = own.number(names::CURRENT_SIZE).unwrap_or(own.virtual_size);
    let by_geometry = own.flag(names::BY_GEOMETRY) && current != own.virtual_size;
    let size = by_geometry.then(|| {
        format!(
            "its geometry says {} bytes, which counts for images of Virtual PC and QEMU; Hyper-V takes it for {current} bytes",
            own.virtual_size
        )
    });
    let saved = own.flag(names::SAVED_STATE).then(|| {
        "its machine was suspended: a resumed machine expects the disk as it was, and it cannot grow".to_owned()
    });
    let footers = own.text(names::FOOTERS).map(|which| {
        format!("of the two copies of its footer, {}: a commit into it, or from it, makes it whole", printable(which))
    });
    let child = own.backing.is_some().then(|| "QEMU reads it as if it had no parent, and says nothing".to_owned());
    refused.into_iter().chain(size).chain(saved).chain(footers).chain(child).map(line).collect()
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

/// An upper bound of how long the file can become, in bytes; `None` beyond 2^63. Of a disk with blocks: as many of them as may
/// arrive, each at a page of its own; one more, for the last that the file has may be cut; a table that is moved for a disk that
/// grows, with a batmap behind it; a footer.
fn longest(own: &ImageFacts, incoming: &Incoming) -> Option<u64> {
    let footer = FOOTER_BYTES as u64;
    let size = own.virtual_size.max(incoming.virtual_size).checked_next_multiple_of(SECTOR)?;
    let length = if own.cluster_size == 0 {
        own.file_length.max(size.checked_add(footer)?)
    } else {
        let stride = own.number(names::STRIDE)?.checked_add(DATA_ALIGNMENT)?;
        let blocks = incoming.units(own.cluster_size).checked_add(1)?.checked_mul(stride)?;
        let entries = size.div_ceil(own.cluster_size);
        let moved = if size > own.virtual_size { entries.checked_mul(5)?.checked_add(4 * SECTOR)? } else { 0 };
        own.file_length.checked_add(blocks)?.checked_add(moved)?.checked_add(2 * footer)?
    };
    Some(length).filter(|&length| length <= i64::MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_plugin_api::Feature;

    fn image(size: u64) -> ImageFacts {
        let mut facts = ImageFacts::new("vpc", size, 2 << 20, 10 << 20).with_clusters_at_most(5);
        facts.features.push(Feature::number(names::CURRENT_SIZE, size, false));
        facts.features.push(Feature::number(names::STRIDE, (2 << 20) + 512, false));
        facts
    }

    fn ask(own: &ImageFacts, other: &ImageFacts) -> Verdict {
        match Incoming::from_layers([other]) {
            Some(incoming) => give(Role::Write, own, &Context::writing(None, incoming)),
            None => Verdict::refused(ErrorCode::NoBacking, ""),
        }
    }

    #[test]
    fn a_child_is_not_larger_than_its_parent() {
        let (small, large) = (image(1 << 30), image(2 << 30));
        for role in [Role::Read, Role::Empty, Role::Below] {
            assert!(give(role, &large, &Context::reading(Some(&small), true)).reason.contains("larger"));
            assert_eq!(give(role, &small, &Context::reading(Some(&large), true)).code, 0);
            // Of another format nothing is said.
            let raw = ImageFacts::new("raw", 1 << 20, 0, 1 << 20);
            assert_eq!(give(role, &large, &Context::reading(Some(&raw), true)).code, 0);
        }
    }

    #[test]
    fn the_bound_covers_what_arrives() {
        let raw = ImageFacts::new("raw", 1 << 30, 0, 1 << 30);
        assert!(ask(&image(1 << 30), &raw).max_length > (10 << 20) + 512 * ((2 << 20) + 512));
        let few = ask(&image(1 << 30), &image(1 << 30)).max_length;
        assert!((20 << 20..24 << 20).contains(&few), "{few}");
        let fixed = ImageFacts::new("vpc", 1 << 20, 0, (1 << 20) + 512);
        assert_eq!(ask(&fixed, &raw).max_length, (1 << 30) + 512);
        assert_eq!(ask(&fixed, &fixed).max_length, fixed.file_length);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let mut facts = image(1 << 30);
        facts.features.push(Feature::text(names::UNSUPPORTED, "because", false));
        assert_eq!(ask(&facts, &facts).reason.as_str(), "because");
        assert!(notes(&facts)[0].contains("because"));
        facts.encrypted = true;
        assert_eq!(ask(&facts, &facts).code, ErrorCode::LuksUnsupported.number());
    }

    #[test]
    fn sizes_that_programs_disagree_about_are_noted() {
        let mut facts = image(1 << 30);
        assert!(notes(&facts).is_empty());
        facts.virtual_size -= 512;
        facts.features.push(Feature::flag(names::BY_GEOMETRY, true, false));
        assert!(notes(&facts)[0].contains("geometry"));
    }
}
