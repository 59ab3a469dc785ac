//! `instar-damage SEED COUNT [FIRST]`: the damage campaign. Each pair is committed, and something else is done with it. Prints
//! figures and every finding; exit code 1 if there is one.
#![allow(missing_docs, clippy::print_stdout)]

use instar_fuzz::operations::{damaged_job, damaged_pair, Ending, Job, Verdict};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What was done with pairs, and what became of them.
struct Tried {
    /// Nothing for a commit.
    job: Option<Job>,
    number: u64,
    verdict: Verdict,
    time: Duration,
}

fn timed(number: u64, call: impl FnOnce() -> (Option<Job>, Verdict)) -> Tried {
    let started = Instant::now();
    let (job, verdict) = call();
    Tried { job, number, verdict, time: started.elapsed() }
}

fn main() -> ExitCode {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let (seed, count) = (numbers.first().copied().unwrap_or(1), numbers.get(1).copied().unwrap_or(10_000));
    let first = numbers.get(2).copied().unwrap_or(0);
    let next = AtomicU64::new(first);
    let tried = Mutex::new(Vec::new());
    let work = || loop {
        let number = next.fetch_add(1, Relaxed);
        if number >= first + count {
            return;
        }
        let commit = timed(number, || (None, damaged_pair(seed, number)));
        let other = timed(number, || {
            let (job, verdict) = damaged_job(seed, number);
            (Some(job), verdict)
        });
        for one in [commit, other] {
            if let Some(finding) = &one.verdict.finding {
                println!("finding, seed {seed}, {finding}");
            }
            if let Ok(mut tried) = tried.lock() {
                tried.push(one);
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let tried: Vec<Tried> = tried.into_inner().unwrap_or_default();
    for Tried { job, number, verdict, .. } in &tried {
        let name = job.map_or("commit", Job::name);
        let failure = verdict.failure.as_deref().unwrap_or_default();
        match verdict.ending {
            Ending::FailedLater => println!("{name} {number} failed after a change: {failure}"),
            // Of a pair that somebody looks at alone.
            Ending::Refused if count == 1 => println!("{name} refused: {failure}"),
            _ => {}
        }
    }
    std::iter::once(None).chain(Job::ALL.map(Some)).for_each(|job| report(seed, job, &tried));
    let findings = tried.iter().filter(|one| one.verdict.finding.is_some()).count();
    println!("damage: {findings} findings");
    ExitCode::from(u8::from(findings > 0))
}

/// The figures of a commit, or of another job.
fn report(seed: u64, job: Option<Job>, tried: &[Tried]) {
    let of: Vec<&Tried> = tried.iter().filter(|one| one.job == job).collect();
    let mut endings: BTreeMap<Ending, usize> = BTreeMap::new();
    of.iter().for_each(|one| *endings.entry(one.verdict.ending).or_default() += 1);
    let compared = of.iter().filter(|one| one.verdict.compared).count();
    let most = of.iter().map(|one| one.verdict.requests).max().unwrap_or(0);
    let slowest = of.iter().max_by_key(|one| one.time).map(|one| (one.number, one.time)).unwrap_or_default();
    println!("{}: seed {seed}, {} pairs, {endings:?}, {compared} compared", job.map_or("commit", Job::name), of.len());
    println!("  at most {most} requests; the slowest is pair {}, {:.2?}", slowest.0, slowest.1);
}
