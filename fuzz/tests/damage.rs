//! A sample of the damage campaign (`make damage`), with a fixed seed.
#![allow(missing_docs, clippy::panic)]

use instar_fuzz::operations::{damaged_job, damaged_pair, Ending, Job};

#[test]
fn a_sample_of_damaged_pairs_has_no_finding() {
    let verdicts: Vec<_> = (0..400).map(|number| damaged_pair(2026, number)).collect();
    let findings: Vec<_> = verdicts.iter().filter_map(|verdict| verdict.finding.as_ref()).collect();
    assert!(findings.is_empty(), "{findings:#?}");
    // It is about commits, and about refusals, and most of them are compared.
    let count = |ending| verdicts.iter().filter(|verdict| verdict.ending == ending).count();
    assert!(count(Ending::Done) > 80 && count(Ending::Refused) > 60, "too few of a kind");
    assert!(verdicts.iter().filter(|verdict| verdict.compared).count() > 150, "too few were compared");
}

#[test]
fn nor_has_one_that_is_resized_rebased_converted_or_repaired() {
    let verdicts: Vec<_> = (0..400).map(|number| damaged_job(2026, number)).collect();
    let findings: Vec<_> = verdicts.iter().filter_map(|(_, verdict)| verdict.finding.as_ref()).collect();
    assert!(findings.is_empty(), "{findings:#?}");
    for job in Job::ALL {
        let of = || verdicts.iter().filter(|(which, _)| *which == job).map(|(_, verdict)| verdict);
        let done = of().filter(|verdict| verdict.ending == Ending::Done && verdict.compared).count();
        let refused = of().filter(|verdict| verdict.ending == Ending::Refused).count();
        assert!(done > 5 && refused > 5, "{job:?}: {done} done, {refused} refused");
    }
}
