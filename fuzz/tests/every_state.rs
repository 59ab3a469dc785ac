//! Power losses in resizes, rebases, repairs and conversions into images that exist, of all formats: from valid images, and from
//! those that an interrupted commit left.
#![allow(missing_docs, clippy::unwrap_used)]

use instar_fuzz::operations::{interrupted_commits, interrupted_job, Fixture, Job, Pairs};
use instar_guest_sdk::crash::Crashes;
use std::collections::BTreeMap;

/// Bytes of images of which each state takes long: the campaign looks at them, and the tests do not.
const LARGE: usize = 4 << 20;

/// Whether the environment asks for more than the tests look at.
fn is_campaign() -> bool {
    std::env::var_os("INSTAR_EVERY_STATE").is_some()
}

/// States of this job with all images; how many runs of it had any, by the format that is changed.
fn of(job: Job) {
    let crashes = Crashes { drawn: usize::from(is_campaign()), seed: 1 };
    let is_large = |fixture: &Fixture| fixture.files.values().map(Vec::len).sum::<usize>() >= LARGE;
    let fixtures = || Pairs::all().iter().flat_map(|pairs| &pairs.fixtures).filter(|f| is_campaign() || !is_large(f));
    let few = match job {
        // Most images have nothing to repair.
        Job::Repair => 1,
        Job::Resize | Job::Rebase => 5,
        Job::Convert => 17,
    };
    let (step, numbers) = if is_campaign() { (1, 4) } else { (few, 1) };
    let (mut runs, mut all) = (BTreeMap::<&str, usize>::new(), 0);
    for (index, fixture) in fixtures().enumerate().filter(|(index, _)| index % step == 0) {
        let interrupted = interrupted_commits(fixture, if is_large(fixture) { 1 } else { 3 });
        for (start, files) in std::iter::once(&fixture.files).chain(&interrupted).enumerate() {
            for number in 0..numbers {
                let number = (index * 31 + start * 7 + number) as u64;
                // What a failure has to show.
                println!("{job:?} of fixture {index}, start {start}, number {number}");
                if let Some(states) = interrupted_job(job, fixture, files, number, crashes) {
                    *runs.entry(fixture.formats[&instar_fuzz::operations::OVERLAY].label).or_default() += 1;
                    all += states;
                }
            }
        }
    }
    println!("{job:?}: {all} states, {runs:?}");
    assert!(runs.values().sum::<usize>() > 5 && all > 40, "{job:?}: {all} states of {runs:?}");
}

#[test]
fn of_resizes() {
    of(Job::Resize);
}

#[test]
fn of_rebases() {
    of(Job::Rebase);
}

#[test]
fn of_repairs() {
    of(Job::Repair);
}

#[test]
fn of_conversions_into_an_image_that_exists() {
    of(Job::Convert);
}
