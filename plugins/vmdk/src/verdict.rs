//! May this image take its part in an operation? What header and descriptor can refuse is refused here.

use crate::facts::names;
use instar_plugin_api::{printable, Context, ErrorCode, ImageFacts, Incoming, Role, Verdict};
use instar_vmdk_format::{GrainMarker, METADATA_MARKER_BYTES, TABLE_BYTES, TABLE_ENTRIES};

/// Entries and bytes of a grain table of ESX.
const COWD_TABLE: (u64, u64) = (4096, 16384);
/// Bytes of a copy of the descriptor, which is 20 sectors long but is told only to the guest, and of what pads it all.
const GROWTH: u64 = 2 << 20;
/// An extent of ESX is a little longer than what is in use.
const COWD_END: u64 = 4096;

/// The verdict on `own`; see [`FormatPlugin::verdict`](instar_plugin_api::FormatPlugin::verdict).
pub fn give(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
    if let Some((code, reason)) = refusal(own) {
        return Verdict::refused(code, reason);
    }
    if own.flag(names::SESPARSE) && matches!(role, Role::Empty | Role::Write) {
        let advice = if role == Role::Empty {
            "it cannot be emptied: commit it with -d, and delete it afterwards"
        } else {
            "it cannot be committed into: commit into the image below it, all layers at once, with -b"
        };
        let reason = format!("VMware documents neither journal nor back map of a seSparse disk, so {advice}");
        return Verdict::refused(ErrorCode::UnsupportedFormat, reason);
    }
    match role {
        // Whether an image goes with its parent, the engine sees from their identities.
        Role::Read | Role::Empty | Role::Below => Verdict::supported(0),
        Role::Write => {
            let below = context.parent.as_ref().map_or(0, |parent| parent.virtual_size);
            of_target(own, &context.arriving(own), below)
        }
    }
}

/// What keeps an image from taking any part.
fn refusal(own: &ImageFacts) -> Option<(ErrorCode, String)> {
    if own.encrypted {
        let reason = "encryption is not supported: convert it to an image without encryption";
        return Some((ErrorCode::LuksUnsupported, reason.to_owned()));
    }
    if let Some(reason) = own.text(names::UNSUPPORTED) {
        return Some((ErrorCode::UnsupportedFormat, printable(reason)));
    }
    if own.flag(names::FLAT) && own.backing.is_some() {
        let reason = "an image with flat extents cannot have a parent: its parentCID is wrong";
        return Some((ErrorCode::UnsupportedFormat, reason.to_owned()));
    }
    None
}

/// What a person should know of an image before it is committed.
pub fn notes(own: &ImageFacts) -> Vec<String> {
    let refused = refusal(own).map(|(_, reason)| format!("cannot be committed: {reason}"));
    let stream = own
        .flag(names::COMPRESSED)
        .then(|| "streamOptimized: a commit into it adds grains, and is refused if it would change one".to_owned());
    let sesparse = own.flag(names::SESPARSE).then(|| {
        "seSparse, which is only read: it is committed with -d, and nothing can be committed into it".to_owned()
    });
    let tracked = own.flag(names::CHANGE_TRACKING).then(|| {
        "VMware's list of changed blocks (changeTrackPath) will not know what is committed into the image".to_owned()
    });
    let announced = own
        .parent_announced
        .then(|| "a commit from it was interrupted: run it again, so that other programs can read it".to_owned());
    // A reason may quote the image, and be longer than a note may be.
    refused.into_iter().chain(announced).chain(stream).chain(sesparse).chain(tracked).map(line).collect()
}

/// A note as long as notes may be, in bytes.
fn line(mut text: String) -> String {
    const MOST: usize = 300;
    let end = (0..=MOST.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    text.truncate(end);
    text
}

/// `below`: bytes of the disk below it, 0 without one.
fn of_target(own: &ImageFacts, incoming: &Incoming, below: u64) -> Verdict {
    let Some(length) = longest(own, incoming, below) else {
        return Verdict::refused(ErrorCode::UnsupportedFormat, "the image would become longer than 2^63 bytes");
    };
    let mut verdict = Verdict::supported(length);
    if own.flag(names::STREAM) {
        verdict.reason =
            "the image cannot be read as a stream afterwards: before it goes into an OVA, make a new one of it \
                          with `instar convert -O vmdk -o subformat=streamOptimized`"
                .into();
    }
    if incoming.virtual_size > own.virtual_size && own.backing.is_some() {
        verdict.reason =
            "VMware opens a disk with a parent only if both have one size: let its parent get the same one".into();
    }
    if own.flag(names::CHANGE_TRACKING) {
        verdict.reason =
            "VMware's list of changed blocks (changeTrackPath) does not know what is committed: make it anew \
                          before the next incremental backup"
                .into();
    }
    verdict
}

/// An upper bound of how long the file can become, in bytes; `None` beyond 2^63. Flat extents stay as they are. As
/// many grains as the disk has, or as may arrive if that is known to be less, each as if it were compressed in vain. Tables in
/// two copies, or longer ones in one copy, all of them new, each with a marker, and a grain to begin at; a grain to begin the
/// file's new part at, which is where the header says.
fn longest(own: &ImageFacts, incoming: &Incoming, below: u64) -> Option<u64> {
    let grown = incoming.virtual_size.saturating_sub(own.virtual_size);
    // What a disk gets by growing: bytes of a flat extent, and, behind the end of a file, new tables and a copy of the
    // descriptor.
    let flat = if own.flag(names::FLAT) { grown } else { 0 };
    let growth = if grown == 0 { 0 } else { flat.checked_add(GROWTH)? };
    if own.cluster_size == 0 {
        return own.file_length.checked_add(growth);
    }
    let grain = own.cluster_size;
    let size = own.virtual_size.checked_add(grown)?;
    let disk = size.div_ceil(grain);
    // Grains of an extent begin where it does, which need not be a multiple of them: a cluster reaches into one more than it
    // has the size of.
    let each = incoming.cluster_size.div_ceil(grain).saturating_add(1);
    // Where a disk that grows would show what is below, zeroes arrive.
    let hidden = below.min(size).saturating_sub(own.virtual_size).div_ceil(grain).checked_add(1)?;
    let hidden = if grown == 0 { 0 } else { hidden };
    let grains = incoming.max_clusters.saturating_mul(each).saturating_add(hidden).min(disk).checked_add(1)?;
    let ((entries, bytes), stored) = if own.flag(names::COWD) {
        (COWD_TABLE, grain)
    } else {
        let table = TABLE_BYTES.checked_add(METADATA_MARKER_BYTES)?;
        ((TABLE_ENTRIES, table.checked_mul(2)?), GrainMarker::longest(grain))
    };
    // A disk that grows has all of its new tables, and directories for them.
    let new_tables = if grown == 0 { 0 } else { grown.div_ceil(grain).div_ceil(entries).checked_add(1)? };
    let directories = if grown == 0 { 0 } else { disk.div_ceil(entries).checked_mul(8)? };
    let tables = disk.div_ceil(entries).min(grains).checked_mul(bytes.checked_add(grain)?)?;
    let tables = tables.checked_add(new_tables.checked_mul(bytes)?)?.checked_add(directories)?.checked_add(growth)?;
    let beyond = own.number(names::COWD_BEYOND).unwrap_or(0).checked_add(COWD_END)?;
    let new = grains.checked_mul(stored)?.checked_add(tables)?.checked_add(beyond)?;
    own.file_length.checked_next_multiple_of(grain)?.checked_add(new).filter(|&length| length <= i64::MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use instar_plugin_api::std_types::ROption;
    use instar_plugin_api::{BackingPointer, Feature};
    use instar_vmdk_format::NO_PARENT;

    fn image(cid: u32, parent: u32) -> ImageFacts {
        let mut facts = ImageFacts::new("vmdk", 1 << 30, 65536, 1 << 20).with_clusters_at_most(1 << 18);
        facts.identity = cid.to_be_bytes().to_vec().into();
        if parent != NO_PARENT {
            facts.backing = ROption::RSome(BackingPointer::new(b"base".to_vec(), Some(b"vmdk".to_vec())));
        }
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
        let mut facts = image(1, NO_PARENT);
        facts.features.push(Feature::text(names::UNSUPPORTED, "because", false));
        assert_eq!(ask(Role::Write, &facts, &facts).reason.as_str(), "because");
        let mut facts = image(1, NO_PARENT);
        facts.encrypted = true;
        assert_eq!(ask(Role::Below, &facts, &facts).code, ErrorCode::LuksUnsupported.number());
        let mut facts = image(1, NO_PARENT);
        facts.features.push(Feature::flag(names::CHANGE_TRACKING, true, false));
        let verdict = ask(Role::Write, &facts, &facts);
        assert!(verdict.code == 0 && verdict.reason.contains("changeTrackPath"));
    }

    /// A grain that does not shrink takes a sector more than its bytes.
    #[test]
    fn the_bound_of_compressed_grains_covers_those_that_do_not_shrink() {
        let mut base = image(1, NO_PARENT);
        base.features.push(Feature::flag(names::COMPRESSED, true, false));
        let verdict = ask(Role::Write, &base, &ImageFacts::new("raw", 1 << 30, 0, 1 << 30));
        let all = (1 << 20) + (1 << 14) * (65536 + 512) + 32 * 2 * (2048 + 512);
        assert!(verdict.reason.is_empty() && (all..all + (4 << 20)).contains(&verdict.max_length), "{verdict:?}");
        base.features.push(Feature::flag(names::STREAM, true, false));
        let verdict = ask(Role::Write, &base, &image(2, 1));
        assert!(verdict.code == 0 && verdict.reason.contains("-o subformat=streamOptimized"), "{verdict:?}");
        assert_eq!(ask(Role::Below, &base, &base).reason.as_str(), "");
    }

    #[test]
    fn sesparse_is_read_and_nothing_else() {
        let (mut top, base) = (image(2, 1), image(1, NO_PARENT));
        top.features.push(Feature::flag(names::SESPARSE, true, false));
        assert!(ask(Role::Empty, &top, &base).reason.contains("commit it with -d"));
        assert!(ask(Role::Write, &top, &image(3, 2)).reason.contains("cannot be committed into"));
        assert_eq!([Role::Read, Role::Below].map(|role| ask(role, &top, &base).code), [0, 0]);
        assert!(notes(&top).iter().any(|note| note.contains("only read")));
    }

    #[test]
    fn the_bound_of_a_delta_covers_its_longer_tables_and_its_gap() {
        let mut delta = ImageFacts { cluster_size: 512, file_length: 20480, ..image(2, 1) };
        delta.features.push(Feature::flag(names::COWD, true, false));
        // A grain for each cluster, and one more; each may be in a table of its own, but no disk has more tables than this.
        let small = ImageFacts { cluster_size: 512, ..image(3, 2) }.with_clusters_at_most(10);
        let bound = ask(Role::Write, &delta, &small).max_length;
        assert_eq!(bound, 20480 + 21 * 512 + 21 * (16384 + 512) + 4096);
        delta.features.push(Feature::number(names::COWD_BEYOND, 1 << 20, false));
        assert_eq!(ask(Role::Write, &delta, &small).max_length, bound + (1 << 20));
        let all = ask(Role::Write, &delta, &ImageFacts::new("raw", 1 << 30, 0, 1 << 30)).max_length;
        assert!(all > (1 << 30) + 512 * 16384 && all < (1 << 30) + 520 * 16896 + (3 << 20), "{all}");
    }

    #[test]
    fn flat_extents_do_not_grow_and_have_no_parent() {
        let mut flat = ImageFacts { cluster_size: 0, ..image(1, NO_PARENT) };
        flat.features.push(Feature::flag(names::FLAT, true, false));
        let verdict = ask(Role::Write, &flat, &image(2, 1));
        assert_eq!((verdict.code, verdict.max_length), (0, flat.file_length));
        let mut overlay = image(2, 1);
        overlay.features.push(Feature::flag(names::FLAT, true, false));
        assert!(ask(Role::Empty, &overlay, &flat).reason.contains("flat"));
    }

    #[test]
    fn the_bound_covers_the_disk_and_follows_the_overlay() {
        let base = image(1, NO_PARENT);
        let raw = ImageFacts::new("raw", 1 << 30, 0, 1 << 30);
        assert!(ask(Role::Write, &base, &raw).max_length >= (1 << 30) + (1 << 20));
        let small = ImageFacts { file_length: 4000, ..image(2, 1) }.with_clusters_at_most(1000);
        let bound = ask(Role::Write, &base, &small).max_length;
        assert!(((1 << 20) + 1000 * 65536..400 << 20).contains(&bound), "{bound}");
    }
}
