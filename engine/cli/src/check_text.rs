//! What `instar check` prints, in the words of `qemu-img check`.

use super::color::Paint;
use instar::bytes::Bytes;
use instar::check::{CheckOutcome, Repaired};
use instar::escape::printable;
use instar_guest_abi::{CheckSummary, FindingKind};
use serde_json::{Map, Value};
use std::fmt::Write as _;

/// The findings of a check, one line each.
pub(super) fn findings(found: &CheckSummary, findings: &[(FindingKind, String)], paint: Paint) -> String {
    let mut text = String::new();
    for (kind, finding) in findings {
        let word = match kind {
            FindingKind::Corruption => paint.bad("ERROR"),
            FindingKind::Leak => paint.warning("Leaked"),
        };
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{word} {}", printable(finding));
    }
    let all = found.corruptions.saturating_add(found.leaks);
    let more = all.saturating_sub(findings.len() as u64);
    if more != 0 {
        let _ = writeln!(text, "… and {more} more");
    }
    text
}

/// What is not repaired, and why, one line each.
pub(super) fn kept(repair: &Repaired) -> String {
    repair.kept.iter().fold(String::new(), |text, (_, line)| text + "Not repaired: " + &printable(line) + "\n")
}

/// What was repaired, or would be; nothing if nothing was to be repaired.
pub(super) fn repaired(repair: &Repaired) -> String {
    let Repaired { corruptions, leaks, dry_run, .. } = *repair;
    if (corruptions, leaks) == (0, 0) {
        return String::new();
    }
    let (begin, end) = if dry_run {
        ("The following inconsistencies would be repaired:", "Nothing was changed.\n")
    } else {
        ("The following inconsistencies were found and repaired:", "Double checking the fixed image now...\n")
    };
    format!("{begin}\n\n    {leaks} leaked clusters\n    {corruptions} corruptions\n\n{end}")
}

/// The summary for people.
pub(super) fn summary(result: &CheckOutcome, paint: Paint) -> String {
    let found = &result.found;
    let mut text = String::new();
    if found.corruptions == 0 && found.leaks == 0 {
        let _ = writeln!(text, "{}", paint.good("No errors were found on the image."));
    }
    // Writing into a string cannot fail.
    if found.corruptions != 0 {
        let _ = writeln!(
            text,
            "\n{}\nData may be corrupted, or further writes to the image may corrupt it.",
            paint.bad(&format!("{} errors were found on the image.", found.corruptions))
        );
    }
    if found.leaks != 0 {
        let _ = writeln!(
            text,
            "\n{}\nThis means waste of disk space, but no harm to data.",
            paint.warning(&format!("{} leaked clusters were found on the image.", found.leaks))
        );
    }
    let (allocated, total) = (found.allocated_clusters, found.total_clusters);
    if allocated != 0 && total != 0 {
        #[allow(clippy::cast_precision_loss, reason = "shown with two digits")]
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        let _ = writeln!(
            text,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(found.fragmented_clusters, allocated),
            percent(found.compressed_clusters, allocated)
        );
    }
    if found.image_end_offset != 0 {
        let _ = writeln!(text, "Image end offset: {}", found.image_end_offset);
    }
    if found.unused_tail != 0 {
        let _ = writeln!(text, "Unused behind it: {} of the file", Bytes(found.unused_tail));
    }
    text
}

/// `qemu-img check`'s keys, and some more; those of counts that are 0 are left out, as there.
pub(super) fn json(result: &CheckOutcome, filename: &str) -> Value {
    let found = &result.found;
    let mut object = Map::new();
    let (mut fixed, mut fixable) = ((0, 0), (0, 0));
    if let Some(repair) = &result.repair {
        *(if repair.dry_run { &mut fixable } else { &mut fixed }) = (repair.leaks, repair.corruptions);
    }
    let counts = [
        ("image-end-offset", found.image_end_offset, false),
        ("total-clusters", found.total_clusters, false),
        ("fragmented-clusters", found.fragmented_clusters, false),
        ("compressed-clusters", found.compressed_clusters, false),
        ("corruptions", found.corruptions, false),
        ("check-errors", 0, true),
        ("leaks", found.leaks, false),
        ("leaks-fixed", fixed.0, false),
        ("corruptions-fixed", fixed.1, false),
        ("leaks-fixable", fixable.0, false),
        ("corruptions-fixable", fixable.1, false),
        ("allocated-clusters", found.allocated_clusters, false),
        ("unused-tail", found.unused_tail, false),
    ];
    for (key, count, always) in counts {
        if always || count != 0 {
            object.insert(key.to_owned(), count.into());
        }
    }
    if let Some(repair) = result.repair.as_ref().filter(|repair| !repair.kept.is_empty()) {
        let lines = repair.kept.iter().map(|(_, line)| Value::from(printable(line).to_string()));
        object.insert("not-repaired".to_owned(), lines.collect());
    }
    object.insert("filename".to_owned(), filename.into());
    object.insert("format".to_owned(), result.format.as_str().into());
    object.insert("sandbox".to_owned(), result.sandbox.into());
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repair(corruptions: u64, leaks: u64, dry_run: bool) -> Repaired {
        let kept = vec![(FindingKind::Corruption, "d\x1b[2J\ne".to_owned())];
        Repaired { corruptions, leaks, dry_run, before: CheckSummary::default(), findings: Vec::new(), kept }
    }

    #[test]
    fn findings_are_safe_and_counted() {
        let found = CheckSummary { leaks: 5, corruptions: 2, ..CheckSummary::default() };
        let findings_of =
            vec![(FindingKind::Leak, "a\x1b[2J\nb".to_owned()), (FindingKind::Corruption, "c".to_owned())];
        let text = findings(&found, &findings_of, Paint::PLAIN);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains("ERROR c\n… and 5 more") && !text.contains('\x1b'), "{text}");
    }

    #[test]
    fn a_repair_is_told_in_the_words_of_qemu() {
        let text = repaired(&repair(2, 3, false));
        assert!(text.contains("found and repaired:\n\n    3 leaked clusters\n    2 corruptions\n\nDouble"), "{text}");
        assert!(
            repaired(&repair(2, 3, true)).contains("would be repaired") && repaired(&repair(0, 0, false)).is_empty()
        );
        let lines = kept(&repair(0, 0, false));
        assert!(
            lines.starts_with("Not repaired: d") && lines.lines().count() == 1 && !lines.contains('\x1b'),
            "{lines}"
        );
    }

    #[test]
    fn programs_are_told_apart_what_was_and_what_would_be_fixed() {
        let outcome = |repair| CheckOutcome {
            format: "x".into(),
            sandbox: "kvm",
            found: CheckSummary::default(),
            findings: Vec::new(),
            repair,
        };
        let of = |result: &CheckOutcome| {
            let object = json(result, "f");
            ["leaks-fixed", "corruptions-fixed", "leaks-fixable", "corruptions-fixable"]
                .map(|key| object.get(key).and_then(Value::as_u64))
        };
        assert_eq!(of(&outcome(None)), [None; 4]);
        assert_eq!(of(&outcome(Some(repair(2, 3, false)))), [Some(3), Some(2), None, None]);
        assert_eq!(of(&outcome(Some(repair(2, 3, true)))), [None, None, Some(3), Some(2)]);
    }
}
