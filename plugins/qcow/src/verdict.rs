//! May this image take its part in an operation? What the header can refuse is refused here.

use crate::facts::names;
use instar_plugin_api::{Context, ErrorCode, ImageFacts, Incoming, Role, Verdict};
use instar_qcow_format::{ENCRYPTED, ENTRY_BYTES};

/// The verdict on `own`; see [`FormatPlugin::verdict`](instar_plugin_api::FormatPlugin::verdict).
pub fn give(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
    if own.encrypted {
        return Verdict::refused(ErrorCode::LuksUnsupported, ENCRYPTED);
    }
    match role {
        Role::Read | Role::Below | Role::Empty => Verdict::supported(0),
        Role::Write => match longest(own, &context.arriving(own)) {
            Some(length) => Verdict::supported(length),
            None => Verdict::refused(ErrorCode::UnsupportedFormat, "the image would become longer than 2^63 bytes"),
        },
    }
}

/// What a person should know of an image before it is committed.
pub fn notes(own: &ImageFacts) -> Vec<String> {
    let encrypted = own.encrypted.then(|| format!("cannot be committed: {ENCRYPTED}"));
    let unnamed = own.backing.is_some().then(|| {
        "records no format of its backing file: it is told by its first bytes, and -F names it if that is raw"
            .to_owned()
    });
    encrypted.into_iter().chain(unnamed).collect()
}

/// An upper bound of how long the file can become, in bytes; `None` beyond 2^63: as many clusters as may arrive, an L2
/// table for each of them up to the number that the disk has, and, if the disk grows, another L1 table and another copy
/// of the last cluster. All of that begins behind the file's last cluster, which may be cut short.
fn longest(own: &ImageFacts, incoming: &Incoming) -> Option<u64> {
    let cluster = own.unit();
    let table = own.number(names::TABLE)?;
    let coverage = (table / ENTRY_BYTES).checked_mul(cluster)?;
    let size = own.virtual_size.max(incoming.virtual_size);
    let clusters = incoming.units(cluster);
    let tables = incoming.units(coverage).min(size.div_ceil(coverage));
    let mut end = own.file_length.checked_next_multiple_of(cluster)?.checked_add(cluster)?;
    end = end.checked_add(clusters.checked_mul(cluster)?)?;
    end = end.checked_add(tables.checked_mul(table.next_multiple_of(cluster))?)?;
    if incoming.virtual_size > own.virtual_size {
        let l1 = size.div_ceil(coverage).checked_mul(ENTRY_BYTES)?.checked_next_multiple_of(cluster)?;
        end = end.checked_add(l1)?.checked_add(cluster)?;
    }
    Some(end).filter(|&end| end <= i64::MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_plugin_api::Feature;

    fn image() -> ImageFacts {
        let mut facts = ImageFacts::new("qcow", 1 << 30, 4096, 10_000);
        facts.features.push(Feature::number(names::TABLE, 4096, true));
        facts
    }

    fn ask(role: Role, own: &ImageFacts, other: &ImageFacts) -> Verdict {
        match Incoming::from_layers([other]).filter(|_| role == Role::Write) {
            Some(incoming) => give(role, own, &Context::writing(None, incoming)),
            None => give(role, own, &Context::reading(Some(other), role != Role::Below)),
        }
    }

    #[test]
    fn encrypted_images_are_refused() {
        let facts = ImageFacts { encrypted: true, ..image() };
        for role in [Role::Read, Role::Write, Role::Empty, Role::Below] {
            let verdict = ask(role, &facts, &image());
            assert!(
                verdict.code == ErrorCode::LuksUnsupported.number() && verdict.reason.contains("encryption"),
                "{role:?}"
            );
            assert_eq!(ask(role, &image(), &image()).code, 0);
        }
        assert_eq!(notes(&facts).len(), 1);
        assert!(notes(&image()).is_empty());
    }

    #[test]
    fn the_bound_follows_what_arrives() {
        let few = ImageFacts::new("raw", 1 << 30, 4096, 0).with_clusters_at_most(5);
        let start = 3 * 4096 + 4096;
        assert_eq!(ask(Role::Write, &image(), &few).max_length, start + 5 * 4096 + 5 * 4096);
        let all = ImageFacts::new("raw", 1 << 30, 4096, 0);
        assert_eq!(ask(Role::Write, &image(), &all).max_length, start + (1 << 30) + 512 * 4096);
        let large = ImageFacts::new("raw", 1 << 31, 4096, 0).with_clusters_at_most(1);
        assert_eq!(ask(Role::Write, &image(), &large).max_length, start + 2 * 4096 + 8192 + 4096);
        let absurd = ImageFacts { file_length: u64::MAX, ..image() };
        assert!(ask(Role::Write, &absurd, &all).reason.contains("2^63"));
    }
}
