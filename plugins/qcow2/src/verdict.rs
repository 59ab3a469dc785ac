//! May this image take its part in an operation? Everything that the header alone can refuse is refused here, by
//! name, before anything is changed. (Compressed clusters cannot be seen from the header: the guest looks for them.)

use crate::facts::{names, NAME_CHARS};
use instar_plugin_api::{printable, Context, ErrorCode, ImageFacts, Incoming, Role, Verdict};
use instar_qcow2_format::{encryption_refusal, ClusterSize, RefcountOrder};

const CHECK: &str = "run `instar check -r all` on it first";

/// The verdict on `own`; see [`FormatPlugin::verdict`](instar_plugin_api::FormatPlugin::verdict).
pub fn give(role: Role, own: &ImageFacts, context: &Context<'_>) -> Verdict {
    if let Some((code, reason)) = refusal(role, own) {
        return Verdict::refused(code, reason);
    }
    match role {
        Role::Write => match longest(own, &context.arriving(own)) {
            Some(length) => Verdict::supported(length),
            None => Verdict::refused(ErrorCode::UnsupportedFormat, "the image would become longer than 2^63 bytes"),
        },
        Role::Empty => {
            // Its last cluster may be cut off behind the last byte that is not zero: metadata there is written as a whole.
            let whole = image_length(own).checked_next_multiple_of(own.cluster_size.max(1)).unwrap_or(0);
            let length = if own.dirty { repaired(own).unwrap_or(0) } else { whole };
            let length = length.saturating_add(own.number(names::DATA_FILE_LENGTH).unwrap_or(0));
            Verdict { reason: snapshot_warning(own, context).into(), ..Verdict::supported(length) }
        }
        Role::Read => Verdict { reason: snapshot_warning(own, context).into(), ..Verdict::supported(0) },
        Role::Below => Verdict::supported(0),
    }
}

/// Internal snapshots of an overlay hold only what was written before them; the rest they read from the backing.
fn snapshot_warning(own: &ImageFacts, context: &Context<'_>) -> String {
    if !context.below_changes || number(own, names::SNAPSHOTS) == 0 {
        return String::new();
    }
    let names = snapshot_names(own);
    format!("its internal snapshots ({names}) see what is committed wherever they hold nothing themselves")
}

/// What a person should know of an image before it is committed.
pub fn notes(own: &ImageFacts) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some((_, reason)) = refusal(Role::Empty, own) {
        notes.push(line(format!("cannot be committed: {reason}")));
    }
    if own.dirty {
        notes.push("was not closed cleanly: a commit repairs its refcounts first".to_owned());
    }
    let count = |name: &str, one: &str, many: &str| match number(own, name) {
        0 => None,
        1 => Some(format!("1 {one}")),
        count => Some(format!("{count} {many}")),
    };
    if let Some(snapshots) = count(names::SNAPSHOTS, "internal snapshot", "internal snapshots") {
        let names = snapshot_names(own);
        let text = "a commit keeps them, and clusters that only they refer to keep using space";
        notes.push(line(format!("{snapshots}: {text} ({names})")));
    }
    if let Some(bitmaps) = count(names::BITMAPS, "persistent bitmap", "persistent bitmaps") {
        notes.push(format!("{bitmaps}: what a commit writes into the image is recorded in those that are enabled"));
    }
    notes
}

/// The names of the internal snapshots, for people.
fn snapshot_names(own: &ImageFacts) -> String {
    const MOST: usize = 200;
    let short = |name: &[u8]| String::from_utf8_lossy(name).chars().take(NAME_CHARS).collect::<String>();
    let names: Vec<String> = own.snapshots.iter().take(MOST).map(|snapshot| short(&snapshot.name)).collect();
    printable(&names.join(", "))
}

/// A note as long as notes may be.
fn line(mut text: String) -> String {
    const MOST: usize = 300;
    if text.len() > MOST {
        let end = (0..=MOST - "…".len()).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

type Refusal = Option<(ErrorCode, String)>;

fn number(facts: &ImageFacts, name: &str) -> u64 {
    facts.number(name).unwrap_or(0)
}

/// What stands in the way of reading an image; all that can be read can be changed.
fn refusal(role: Role, own: &ImageFacts) -> Refusal {
    let corrupt = match role {
        Role::Read | Role::Empty => ErrorCode::OverlayCorrupt,
        Role::Write | Role::Below => ErrorCode::BackingCorrupt,
    };
    if own.corrupt {
        return Some((corrupt, format!("the image is marked corrupt: {CHECK}")));
    }
    if own.encrypted {
        let method = own.text(names::ENCRYPTION).unwrap_or("unknown");
        let reason = encryption_refusal(method);
        return Some((ErrorCode::LuksUnsupported, reason));
    }
    if let Some(reason) = own.text(names::DATA_FILE_REFUSED) {
        return Some((ErrorCode::ExternalDataFile, reason.to_owned()));
    }
    if let Some(list) = own.text(names::UNKNOWN_FEATURES) {
        let reason = format!("the image uses incompatible features that this plugin does not know: {list}");
        return Some((ErrorCode::UnsupportedFormat, reason));
    }
    None
}

/// An upper bound of how long the file can become, in bytes; `None` beyond 2^63.
///
/// Nothing in the file is counted as reused. In clusters:
/// * as many as the file has now, the last one rounded up;
/// * one for each cluster of data or zeroes that arrives, which is all that can be said: a compressed cluster takes next to
///   no room where it comes from, a zero cluster has no place there but becomes a cluster of zeroes in a version 2 image,
///   and where the image's clusters are larger, each that arrives may fall into another one;
/// * one for each L2 table that is missing: no more than clusters arrive, or than the virtual disk has;
/// * for each bitmap, which QEMU limits to 65,535, one for each cluster of bits: as many as the disk has with the finest
///   granularity, 512 bytes, but no more than data clusters arrive: the bits of one are never in two clusters;
/// * the L1 table, when it has to grow and move for a larger virtual size; as much again is passed over to find a run of
///   clusters for it, twice at most, with what the refcount blocks in between take. L2 tables for all that is new, to hide
///   longer ancestors, and the cluster at the old end, each counted apart from those for the overlay's data;
/// * refcount blocks for everything, themselves included, as if none were there; and the refcount table, which moves
///   when it grows, twice as long as needed;
/// * in a data file, what the disk is longer;
/// * all that is new once more: a power loss may leave the refcounts of a first attempt, but not the length of the file. Those
///   leaks past its end are passed over.
fn longest(own: &ImageFacts, incoming: &Incoming) -> Option<u64> {
    let cs = ClusterSize::from_bits(own.cluster_size.trailing_zeros()).filter(|cs| cs.bytes() == own.cluster_size)?;
    let virtual_size = own.virtual_size.max(incoming.virtual_size);
    // Extended entries are twice as long: a table covers half as much.
    let coverage = if own.flag(names::EXTENDED_L2) { cs.l2_coverage() / 2 } else { cs.l2_coverage() };
    let arriving = incoming.units(cs.bytes());
    // In a data file, each cluster has its place.
    let data_file = own.number(names::DATA_FILE_LENGTH);
    let data = if data_file.is_some() { 0 } else { arriving };
    let l1_entries = virtual_size.div_ceil(coverage);
    // One more L2 table than entries of L1 cannot be needed; with one for good measure.
    let tables = arriving.min(l1_entries.checked_add(1)?);
    let l1 = cs.count_for(l1_entries.checked_mul(8)?);
    let of_each = cs.count_for(virtual_size.div_ceil(512).div_ceil(8)).min(arriving);
    let bitmaps = number(own, names::BITMAPS).min(65535).checked_mul(of_each)?;
    let growth = match incoming.virtual_size.saturating_sub(own.virtual_size) {
        0 => 0,
        new => new.div_ceil(coverage).checked_add(l1.checked_mul(3)?)?.checked_add(16)?,
    };
    let new = [data, tables, l1, bitmaps, growth, 2].into_iter().try_fold(0, u64::checked_add)?;
    let file = cs.count_for(image_length(own));
    let first = with_refcounts(own, cs, file.checked_add(new)?)?;
    let longest = with_refcounts(own, cs, cs.count_for(first).checked_add(new)?)?;
    let Some(data_file) = data_file else { return Some(longest) };
    longest.checked_add(data_file.max(virtual_size)).filter(|&all| all <= i64::MAX as u64)
}

/// Length in bytes of the image itself, without its data file.
fn image_length(own: &ImageFacts) -> u64 {
    own.file_length.saturating_sub(own.number(names::DATA_FILE_LENGTH).unwrap_or(0))
}

/// How long the file of an image that is repaired can become, in bytes: refcount blocks may be missing.
fn repaired(own: &ImageFacts) -> Option<u64> {
    let cs = ClusterSize::from_bits(own.cluster_size.trailing_zeros()).filter(|cs| cs.bytes() == own.cluster_size)?;
    with_refcounts(own, cs, cs.count_for(image_length(own)))
}

/// The length in bytes of a file with this many clusters, and after them all refcount blocks and a refcount table.
fn with_refcounts(own: &ImageFacts, cs: ClusterSize, content: u64) -> Option<u64> {
    let order = RefcountOrder::new(u32::try_from(number(own, names::REFCOUNT_BITS)).ok()?.trailing_zeros())?;
    let per_block = order.entries_in(cs.bytes());
    let (mut blocks, mut table) = (0u64, 0u64);
    loop {
        let total = content.checked_add(blocks)?.checked_add(table)?;
        let needed_blocks = total.div_ceil(per_block).checked_add(1)?;
        let needed_table = cs.count_for(needed_blocks.checked_mul(8)?).checked_mul(2)?;
        if needed_blocks <= blocks && needed_table <= table {
            return total.checked_mul(cs.bytes()).filter(|&length| length <= i64::MAX as u64);
        }
        blocks = blocks.max(needed_blocks);
        table = table.max(needed_table);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_plugin_api::Feature;
    use instar_plugin_api::SnapshotFacts;

    fn image(cluster_size: u64, file_length: u64, virtual_size: u64) -> ImageFacts {
        let facts = ImageFacts::new("qcow2", virtual_size, cluster_size, file_length);
        let mut facts = facts.with_clusters_at_most(file_length.div_ceil(8));
        facts.features.push(Feature::text("compat", "1.1", true));
        facts.features.push(Feature::number("refcount-bits", 16, true));
        facts
    }

    fn ask(role: Role, own: &ImageFacts, other: &ImageFacts) -> Verdict {
        let context = match role {
            Role::Write => Context::writing(None, Incoming::from_layers([other]).unwrap()),
            _ => Context::reading(Some(other), role != Role::Below),
        };
        give(role, own, &context)
    }

    fn with(feature: Feature) -> ImageFacts {
        let mut facts = image(65536, 262_144, 1 << 30);
        facts.features.retain(|f| f.name != feature.name);
        facts.features.push(feature);
        facts
    }

    #[test]
    fn plain_images_are_taken() {
        let facts = image(65536, 262_144, 1 << 30);
        for role in [Role::Read, Role::Write, Role::Empty, Role::Below] {
            assert_eq!(ask(role, &facts, &facts).code, 0);
        }
    }

    #[test]
    fn an_overlay_may_get_its_last_cluster_back() {
        for (length, bound) in [(262_144, 262_144), (262_145, 327_680), (327_679, 327_680)] {
            let facts = image(65536, length, 1 << 30);
            assert_eq!(ask(Role::Empty, &facts, &facts).max_length, bound);
        }
    }

    #[test]
    fn what_the_first_release_does_not_cover_is_named() {
        let plain = image(65536, 262_144, 1 << 30);
        let cases = [
            (Feature::text("data-file-refused", "its data file", false), "data file", true, true),
            (Feature::text("unknown-incompatible-features", "bit 20 (\"x\")", false), "bit 20 (\"x\")", true, true),
        ];
        for (feature, words, overlay_too, ancestor_too) in cases {
            let facts = with(feature);
            let verdict = ask(Role::Write, &facts, &plain);
            assert_ne!(verdict.code, 0);
            assert!(verdict.reason.contains(words), "{}", verdict.reason);
            assert_eq!(ask(Role::Empty, &facts, &plain).code != 0, overlay_too, "{words}");
            assert_eq!(ask(Role::Below, &facts, &plain).code != 0, ancestor_too, "{words}");
        }
    }

    #[test]
    fn snapshots_of_the_overlay_are_worth_a_warning() {
        let mut facts = with(Feature::number("snapshots", 2, false));
        facts.snapshots = ["one", "two"].map(|name| SnapshotFacts::new(b"", name.as_bytes(), 0)).into_iter().collect();
        let verdict = ask(Role::Empty, &facts, &image(65536, 262_144, 1 << 30));
        assert_eq!(verdict.code, 0);
        assert!(verdict.reason.contains("(one, two)"), "{}", verdict.reason);
        assert!(ask(Role::Write, &facts, &facts).reason.is_empty());
    }

    #[test]
    fn corrupt_and_encrypted() {
        let plain = image(65536, 262_144, 1 << 30);
        let corrupt = ImageFacts { corrupt: true, ..plain.clone() };
        assert_eq!(ask(Role::Empty, &corrupt, &plain).code, ErrorCode::OverlayCorrupt.number());
        assert_eq!(ask(Role::Write, &corrupt, &plain).code, ErrorCode::BackingCorrupt.number());
        assert_eq!(ask(Role::Below, &corrupt, &plain).code, ErrorCode::BackingCorrupt.number());
        let encrypted = ImageFacts { encrypted: true, ..plain.clone() };
        assert_eq!(ask(Role::Below, &encrypted, &plain).code, ErrorCode::LuksUnsupported.number());
    }

    #[test]
    fn images_with_the_dirty_bit_are_taken() {
        let plain = image(65536, 262_144, 1 << 30);
        let dirty = ImageFacts { dirty: true, ..plain.clone() };
        for role in [Role::Read, Role::Write, Role::Empty, Role::Below] {
            assert_eq!(ask(role, &dirty, &plain).code, 0);
        }
        // Refcount blocks of an overlay may be missing.
        assert_eq!(ask(Role::Empty, &plain, &plain).max_length, 262_144);
        assert!(ask(Role::Empty, &dirty, &plain).max_length > dirty.file_length);
    }

    #[test]
    fn the_bound_covers_clusters_that_are_larger_in_the_backing() {
        // 1000 overlay clusters of 4 KiB, each in another backing cluster of 2 MiB.
        let overlay = image(4096, 1004 * 4096, 1 << 40);
        let backing = image(2 << 20, 8 << 20, 1 << 40);
        assert!(ask(Role::Write, &backing, &overlay).max_length > (8 << 20) + 1000 * (2 << 20));
    }

    #[test]
    fn the_bound_covers_scattered_clusters() {
        for bits in 9..=21u32 {
            let cs = 1u64 << bits;
            // One L2 table for each data cluster.
            let pairs = 1000u64;
            let coverage = cs * (cs / 8);
            let overlay = image(cs, (pairs * 2 + 4) * cs, pairs * coverage);
            let backing = image(cs, 3 * cs + 8 * pairs, pairs * coverage);
            let bound = ask(Role::Write, &backing, &overlay).max_length;
            let new = pairs * 2 + (pairs * 2) / (cs / 2) + 1;
            assert!(bound >= backing.file_length.next_multiple_of(cs) + new * cs, "{bits}");
            // And it follows from what the overlay's tables can say, not from the size of the disk.
            let entries = overlay.file_length / 8;
            assert!(bound <= backing.file_length + 2 * (entries + pairs + 64) * cs * 11 / 10, "{bits} {bound}");
        }
    }

    #[test]
    fn the_bound_covers_zero_clusters_in_version_2() {
        let overlay = image(65536, 10 * 65536, 1 << 40);
        let mut backing = image(65536, 262_144, 1 << 40);
        backing.features[0] = Feature::text("compat", "0.10", true);
        assert!(ask(Role::Write, &backing, &overlay).max_length > 65536 * 8192);
    }

    #[test]
    fn the_bound_covers_compressed_clusters() {
        // One L2 table full of compressed clusters that share one host cluster.
        let overlay = image(65536, 6 * 65536, 1 << 40);
        let backing = image(65536, 262_144, 1 << 40);
        assert!(ask(Role::Write, &backing, &overlay).max_length > 65536 * 8192);
        let small = image(4096, 262_144, 1 << 40);
        assert!(ask(Role::Write, &small, &overlay).max_length > 65536 * 8192);
    }

    #[test]
    fn the_bound_covers_the_clusters_of_bitmaps() {
        let overlay = image(65536, 10 * 65536, 1 << 40);
        let plain = ask(Role::Write, &image(65536, 262_144, 1 << 40), &overlay).max_length;
        let mut backing = image(65536, 262_144, 1 << 40);
        backing.features.push(Feature::number("bitmap-count", 3, false));
        // 2^31 sectors: 2^28 bytes of bits, 4096 clusters each.
        let verdict = ask(Role::Write, &backing, &overlay);
        assert_eq!(verdict.code, 0);
        assert!(verdict.max_length >= plain + 3 * 4096 * 65536, "{}", verdict.max_length);
        // No more than data clusters arrive.
        let few = ask(Role::Write, &backing, &image(65536, 800, 1 << 40)).max_length;
        assert!(few < 2 * 600 * 65536, "{few}");
        backing.features.pop();
        backing.features.push(Feature::number("bitmap-count", u64::MAX, false));
        assert!(ask(Role::Write, &backing, &overlay).max_length > plain);
    }

    /// Found by the crash simulator: the refcounts of 94 new clusters were durable, the length of the file was not.
    #[test]
    fn the_bound_covers_what_a_first_attempt_leaked() {
        // All of the disk arrives, and nothing of it was there.
        let overlay = image(4096, 100 * 4096, 96 * 4096);
        let backing = image(512, 4 * 512, 96 * 4096);
        let new = 96 * 8 + 96 * 8 / 64;
        assert!(ask(Role::Write, &backing, &overlay).max_length > backing.file_length + 2 * new * 512);
    }

    #[test]
    fn the_bound_covers_a_backing_that_grows() {
        let overlay = image(65536, 262_144, 8 << 40);
        let backing = image(65536, 262_144, 1 << 30);
        // The L1 table, and an L2 table for each of its entries.
        let entries = (8u64 << 40) >> 29;
        assert!(ask(Role::Write, &backing, &overlay).max_length > 262_144 + entries * 8 + entries * 65536);
    }

    #[test]
    fn absurd_facts_do_not_overflow() {
        let absurd = image(65536, u64::MAX, u64::MAX);
        assert_ne!(ask(Role::Write, &absurd, &absurd).code, 0);
        assert_ne!(ask(Role::Write, &image(0, 1, 1), &image(0, 1, 1)).code, 0);
    }
}
