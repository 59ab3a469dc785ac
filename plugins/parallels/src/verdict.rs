//! May this image take its part in an operation? What the header can refuse is refused here.

use crate::facts::names;
use instar_parallels_format::{Header, MOST_ENTRIES};
use instar_plugin_api::{printable, Context, ErrorCode, ImageFacts, Incoming, Role, Verdict};

/// What is said of an image that was not closed.
const OPEN: &str =
    "was not closed: run a commit that was interrupted again; otherwise make sure that nothing has it open for writing";
/// What is said of an image whose format extension goes.
const EXTENSION: &str =
    "loses its format extension, with the dirty bitmaps in it: the next backup has to be a full one";

fn refused(reason: &str) -> Verdict {
    Verdict::refused(ErrorCode::UnsupportedFormat, printable(reason))
}

/// Supported, with what a person should know.
fn warned(max_length: u64, warnings: &[&str]) -> Verdict {
    Verdict { reason: warnings.join("; ").into(), ..Verdict::supported(max_length) }
}

/// The verdict on `own`; see [`FormatPlugin::verdict`](instar_plugin_api::FormatPlugin::verdict).
pub fn give(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
    let open = own.dirty.then_some(OPEN);
    let extension = own.flag(names::EXTENSION).then_some(EXTENSION);
    let warnings: Vec<&str> = open.into_iter().chain(extension).collect();
    match role {
        Role::Below => Verdict::supported(0),
        Role::Read => child(own, context).unwrap_or_else(|| warned(0, open.as_slice())),
        Role::Empty => {
            let kept = own.text(names::UNCHANGEABLE).map(refused);
            kept.or_else(|| child(own, context)).unwrap_or_else(|| warned(0, &warnings))
        }
        Role::Write => {
            let kept = own.text(names::UNCHANGEABLE).or_else(|| own.text(names::READ_ONLY));
            match (kept, longest(own, &context.arriving(own))) {
                (Some(reason), _) => refused(reason),
                (None, Some(length)) => warned(length, &warnings),
                (None, None) => refused("the image would become longer than 2^63 bytes"),
            }
        }
    }
}

/// Why an image does not go with the parent that the operator named, if that is one that records no parent of its own. It may
/// be a snapshot, too, and what it lies over is not known here. That does no harm as long as it gets whole clusters: of
/// anything less, the rest would have to be filled up from there; and what lies below would show where the parent has grown.
fn child(own: &ImageFacts, context: &Context<'_>) -> Option<Verdict> {
    let parent = context.parent.into_option()?;
    let (cluster, parents) = (own.number(names::CLUSTER)?, parent.number(names::CLUSTER)?);
    if parents != 0 && cluster.is_multiple_of(parents) {
        let (size, parents_size) = (own.virtual_size, parent.virtual_size);
        if size == parents_size || size < parents_size && size.is_multiple_of(parents) {
            return None;
        }
        return Some(refused(&format!(
            "has a disk of {size} bytes, and its parent one of {parents_size}, but all layers of a Parallels disk have the same \
             size: the parent may be a snapshot itself, and what lies below would be needed where they differ"
        )));
    }
    Some(refused(&format!(
        "has clusters of {cluster} bytes, and its parent of {parents}: the parent may be a snapshot itself, and what lies \
         below would be needed to fill up its clusters"
    )))
}

/// What a person should know of an image before it is committed.
pub fn notes(own: &ImageFacts) -> Vec<String> {
    let unchangeable = own.text(names::UNCHANGEABLE);
    let kept = unchangeable.map(|reason| format!("cannot be changed: {}", printable(reason)));
    let read_only = own.text(names::READ_ONLY).map(|reason| format!("cannot be written: {}", printable(reason)));
    let open = own.dirty.then(|| OPEN.to_owned());
    let extension = own.flag(names::EXTENSION) && unchangeable.is_none();
    let extension = extension.then(|| format!("in a commit it {EXTENSION}"));
    let parent =
        "records no parent: if it is a snapshot, `instar commit -b` names that (DiskDescriptor.xml beside it says which)"
            .to_owned();
    kept.into_iter().chain(read_only).chain(open).chain(extension).chain([parent]).collect()
}

/// An upper bound of how long the file can become, in bytes; `None` beyond 2^63: as many clusters more as may arrive, and, where
/// the BAT becomes longer, those in its way.
fn longest(own: &ImageFacts, incoming: &Incoming) -> Option<u64> {
    let cluster = own.number(names::CLUSTER).filter(|&cluster| cluster > 0)?;
    let data = own.number(names::DATA_START)?;
    let size = own.virtual_size.max(incoming.virtual_size);
    let arriving = if cluster.is_power_of_two() {
        incoming.units(cluster)
    } else {
        // One of theirs touches one more of ours than it has room for.
        incoming.max_clusters.saturating_mul(incoming.cluster_size.div_ceil(cluster).saturating_add(1))
    };
    let arriving = arriving.min(size.div_ceil(cluster));
    let mut begin = own.file_length.max(data);
    let mut moved = 0;
    if incoming.virtual_size > own.virtual_size {
        let end = Header::entry_place(size.div_ceil(cluster).min(MOST_ENTRIES.into()));
        moved = end.saturating_sub(data).div_ceil(cluster);
        begin = begin.max(data.checked_add(moved.checked_mul(cluster)?)?);
    }
    let end = arriving.checked_add(moved)?.checked_mul(cluster)?.checked_add(begin)?;
    Some(end).filter(|&end| end <= i64::MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_plugin_api::Feature;

    const MIB: u64 = 1 << 20;

    fn of_clusters(cluster: u64) -> ImageFacts {
        let mut facts = ImageFacts::new("parallels", 1 << 30, 1 << cluster.trailing_zeros(), 12 * cluster);
        facts.features.push(Feature::number(names::CLUSTER, cluster, true));
        facts.features.push(Feature::number(names::DATA_START, cluster, false));
        facts
    }

    fn image() -> ImageFacts {
        of_clusters(MIB)
    }

    fn ask(role: Role, own: &ImageFacts, other: &ImageFacts) -> Verdict {
        match Incoming::from_layers([other]).filter(|_| role == Role::Write) {
            Some(incoming) => give(role, own, &Context::writing(None, incoming)),
            None => give(role, own, &Context::reading(Some(other), role != Role::Below)),
        }
    }

    #[test]
    fn what_must_stay_is_not_changed() {
        for (name, roles) in [(names::UNCHANGEABLE, [0, 1, 0, 1]), (names::READ_ONLY, [0, 1, 0, 0])] {
            let mut facts = image();
            facts.features.push(Feature::text(name, "because", false));
            let refused =
                [Role::Read, Role::Write, Role::Below, Role::Empty].map(|role| ask(role, &facts, &facts).code != 0);
            assert_eq!(refused, roles.map(|refused| refused == 1), "{name}");
            assert!(notes(&facts)[0].contains("because"));
        }
    }

    #[test]
    fn what_a_person_should_know() {
        assert!(ask(Role::Write, &image(), &image()).reason.is_empty());
        assert_eq!(notes(&image()).len(), 1);
        let mut facts = ImageFacts { dirty: true, ..image() };
        facts.features.push(Feature::flag(names::EXTENSION, true, true));
        for (role, open, extension) in [
            (Role::Read, true, false),
            (Role::Empty, true, true),
            (Role::Write, true, true),
            (Role::Below, false, false),
        ] {
            let verdict = ask(role, &facts, &image());
            let says = |text: &str| verdict.reason.contains(text);
            assert_eq!((verdict.code, says("was not closed"), says("bitmaps")), (0, open, extension), "{role:?}");
        }
        assert_eq!(notes(&facts).len(), 3);
    }

    #[test]
    fn a_parent_gets_whole_clusters() {
        for role in [Role::Read, Role::Empty] {
            for (own, parent, good) in
                [(MIB, MIB, true), (MIB, 1 << 16, true), (63 * 512, MIB, false), (512, 63 * 512, false)]
            {
                let verdict = ask(role, &of_clusters(own), &of_clusters(parent));
                assert_eq!(verdict.code == 0, good, "{own} {parent}: {}", verdict.reason);
            }
            // Where the sizes differ, whole clusters are at stake.
            for (own, parent, good) in [(MIB, 2 * MIB, true), (MIB + 512, 2 * MIB, false), (2 * MIB, MIB, false)] {
                let [own, parent] = [own, parent].map(|virtual_size| ImageFacts { virtual_size, ..image() });
                assert_eq!(ask(role, &own, &parent).code == 0, good, "{} {}", own.virtual_size, parent.virtual_size);
            }
            assert_eq!(ask(role, &image(), &ImageFacts::new("qcow2", 1 << 31, 512, 0)).code, 0);
        }
    }

    #[test]
    fn the_bound_follows_what_arrives() {
        let few = ImageFacts::new("raw", 1 << 30, MIB, 0).with_clusters_at_most(5);
        assert_eq!(ask(Role::Write, &image(), &few).max_length, (12 + 5) * MIB);
        let all = ImageFacts::new("raw", 1 << 30, 0, 0);
        assert_eq!(ask(Role::Write, &image(), &all).max_length, (12 + 1024) * MIB);
        assert_eq!(ask(Role::Write, &of_clusters(63 * 512), &few).max_length, (12 + 5 * 34) * 63 * 512);
        // A BAT for 16 TiB takes 65 clusters, the first of which is there.
        let large = ImageFacts::new("raw", 1 << 44, MIB, 0).with_clusters_at_most(1);
        assert_eq!(ask(Role::Write, &image(), &large).max_length, (65 + 64 + 1) * MIB);
        let absurd = ImageFacts { file_length: u64::MAX, ..image() };
        assert!(ask(Role::Write, &absurd, &all).reason.contains("2^63"));
    }
}
