//! `instar-damage SEED COUNT [FIRST]`: the damage campaign. Prints figures and every finding; exit code 1 if there is one.
#![allow(missing_docs, clippy::print_stdout)]

use instar_fuzz::operations::{damaged_pair, Ending, Verdict};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Mutex;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let (seed, count) = (numbers.first().copied().unwrap_or(1), numbers.get(1).copied().unwrap_or(10_000));
    let first = numbers.get(2).copied().unwrap_or(0);
    let (next, slowest) = (AtomicU64::new(first), Mutex::new((Duration::ZERO, 0)));
    let verdicts = Mutex::new(Vec::new());
    let work = || loop {
        let number = next.fetch_add(1, Relaxed);
        if number >= first + count {
            return;
        }
        let started = Instant::now();
        let verdict = damaged_pair(seed, number);
        if let Ok(mut slowest) = slowest.lock() {
            *slowest = (*slowest).max((started.elapsed(), number));
        }
        if let Some(finding) = &verdict.finding {
            println!("finding, seed {seed}, {finding}");
        }
        if let Ok(mut verdicts) = verdicts.lock() {
            verdicts.push(verdict);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let verdicts: Vec<Verdict> = verdicts.into_inner().unwrap_or_default();
    let mut endings: BTreeMap<Ending, usize> = BTreeMap::new();
    verdicts.iter().for_each(|verdict| *endings.entry(verdict.ending).or_default() += 1);
    for verdict in verdicts.iter().filter(|verdict| verdict.ending == Ending::FailedLater) {
        println!("failed after a change: {}", verdict.failure.as_deref().unwrap_or_default());
    }
    // Of a pair that somebody looks at alone.
    if let [Verdict { ending: Ending::Refused, failure: Some(failure), .. }] = verdicts.as_slice() {
        println!("refused: {failure}");
    }
    let findings = verdicts.iter().filter(|verdict| verdict.finding.is_some()).count();
    let compared = verdicts.iter().filter(|verdict| verdict.compared).count();
    let most = verdicts.iter().map(|verdict| verdict.requests).max().unwrap_or(0);
    let (time, number) = slowest.into_inner().unwrap_or_default();
    println!("damage: seed {seed}, {} pairs, {endings:?}, {compared} compared", verdicts.len());
    println!("damage: at most {most} requests; the slowest is pair {number}, {time:.2?}; {findings} findings");
    ExitCode::from(u8::from(findings > 0))
}
