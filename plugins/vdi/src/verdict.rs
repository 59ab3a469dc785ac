//! May this image take its part in an operation? What the header can refuse is refused here.

use crate::facts::names;
use instar_plugin_api::{printable, Context, ErrorCode, ImageFacts, Incoming, Role, Verdict};
use instar_vdi_format::ENTRY_BYTES;

/// The verdict on `own`; see [`FormatPlugin::verdict`](instar_plugin_api::FormatPlugin::verdict).
pub fn give(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
    let refused = |reason: &str| Verdict::refused(ErrorCode::UnsupportedFormat, printable(reason));
    if let Some(reason) = own.text(names::UNSUPPORTED) {
        return refused(reason);
    }
    match role {
        // Whether an image goes with its parent, the engine sees from their identities.
        Role::Read | Role::Below => Verdict::supported(0),
        Role::Empty if own.flag(names::STATIC) => {
            refused("a static image holds all of its disk, and cannot be emptied")
        }
        Role::Empty => Verdict::supported(0),
        Role::Write => match own.text(names::READ_ONLY) {
            Some(reason) => refused(reason),
            None => of_target(own, &context.arriving(own)),
        },
    }
}

/// What a person should know of an image before it is committed.
pub fn notes(own: &ImageFacts) -> Vec<String> {
    let refused = own.text(names::UNSUPPORTED).map(|reason| format!("cannot be committed: {}", printable(reason)));
    let read_only = own.text(names::READ_ONLY).map(|reason| format!("cannot be written: {}", printable(reason)));
    let announced = own
        .parent_announced
        .then(|| "a commit from it was interrupted: run it again, so that other programs can read it".to_owned());
    let parent = own.text(names::PARENT).map(|uuid| {
        let uuid = printable(uuid);
        format!("records no path of its parent: that is {{{uuid}}}.vdi, or another image beside it with that uuid")
    });
    refused.into_iter().chain(read_only).chain(announced).chain(parent).collect()
}

fn of_target(own: &ImageFacts, incoming: &Incoming) -> Verdict {
    match longest(own, incoming) {
        Some(length) => Verdict::supported(length),
        None => Verdict::refused(ErrorCode::UnsupportedFormat, "the image would become longer than 2^63 bytes"),
    }
}

/// An upper bound of how long the file can become, in bytes; `None` beyond 2^63: as many blocks more as may arrive, and one
/// that is cut when the disk grows; to make room for a longer map, it takes the place of some blocks, which are moved.
fn longest(own: &ImageFacts, incoming: &Incoming) -> Option<u64> {
    let block = own.unit();
    let data = own.number(names::DATA_OFFSET).unwrap_or(0);
    let slots = own.file_length.saturating_sub(data).div_ceil(block);
    let size = own.virtual_size.max(incoming.virtual_size);
    let moved = if incoming.virtual_size > own.virtual_size {
        // It may have more entries than the disk has blocks: the map ends where the data begins.
        let entries = size.div_ceil(block).max(data / ENTRY_BYTES);
        entries.checked_mul(ENTRY_BYTES)?.div_ceil(block).checked_add(1)?
    } else {
        0
    };
    let begin = slots.max(moved).checked_add(moved)?;
    let slots = begin.checked_add(incoming.units(block))?.checked_add(1)?;
    let end = slots.checked_mul(block)?.checked_add(data)?.max(own.file_length);
    Some(end).filter(|&end| end <= i64::MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_plugin_api::Feature;

    const MIB: u64 = 1 << 20;

    fn image() -> ImageFacts {
        let mut facts = ImageFacts::new("vdi", 1 << 30, MIB, 12 * MIB);
        facts.features.push(Feature::number(names::DATA_OFFSET, 2 * MIB, false));
        facts
    }

    fn ask(role: Role, own: &ImageFacts, other: &ImageFacts) -> Verdict {
        match Incoming::from_layers([other]).filter(|_| role == Role::Write) {
            Some(incoming) => give(role, own, &Context::writing(None, incoming)),
            None => give(role, own, &Context::reading(Some(other), role != Role::Below)),
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let mut facts = image();
        facts.features.push(Feature::flag(names::STATIC, true, false));
        assert!(ask(Role::Empty, &facts, &facts).reason.contains("static"));
        assert_eq!([Role::Read, Role::Write, Role::Below].map(|role| ask(role, &facts, &facts).code), [0; 3]);
        let mut facts = image();
        facts.features.push(Feature::text(names::READ_ONLY, "because", false));
        assert_eq!(ask(Role::Write, &facts, &facts).reason.as_str(), "because");
        assert_eq!([Role::Read, Role::Empty, Role::Below].map(|role| ask(role, &facts, &facts).code), [0; 3]);
        facts.features.push(Feature::text(names::UNSUPPORTED, "nonsense", false));
        for role in [Role::Read, Role::Write, Role::Empty, Role::Below] {
            assert_eq!(ask(role, &facts, &facts).reason.as_str(), "nonsense");
        }
        assert_eq!(notes(&facts), ["cannot be committed: nonsense", "cannot be written: because"]);
    }

    #[test]
    fn the_bound_follows_what_arrives() {
        let few = ImageFacts::new("raw", 1 << 30, MIB, 0).with_clusters_at_most(5);
        assert_eq!(ask(Role::Write, &image(), &few).max_length, (12 + 5 + 1) * MIB);
        let all = ImageFacts::new("raw", 1 << 30, 0, 0);
        assert_eq!(ask(Role::Write, &image(), &all).max_length, (12 + 1024 + 1) * MIB);
        // A map for 16 TiB takes 64 blocks: they are moved, and it stands in their place.
        let large = ImageFacts::new("raw", 1 << 44, MIB, 0).with_clusters_at_most(1);
        assert_eq!(ask(Role::Write, &image(), &large).max_length, (2 + 65 + 65 + 1 + 1) * MIB);
        let absurd = ImageFacts { file_length: u64::MAX, ..image() };
        assert!(ask(Role::Write, &absurd, &all).reason.contains("2^63"));
    }
}
