//! `instar-fuzz [TARGET…] [--seconds N] [--seed N]`: run targets, all by default, for a time each. A finding ends it with
//! status 1; the input is written to a file that `--input FILE` takes.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use instar_fuzz::generator::{input, Random};
use instar_fuzz::{Target, TARGETS};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// An input that takes longer than this is a finding, too.
const SLOW: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let mut seconds = 60;
    let mut seed = 1;
    let mut file = None;
    let mut names = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--seconds" => seconds = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(seconds),
            "--seed" => seed = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(seed),
            "--input" => file = arguments.next(),
            _ => names.push(argument),
        }
    }
    let chosen = |target: &&Target| names.is_empty() || names.iter().any(|name| name == target.name);
    let targets: Vec<&Target> = TARGETS.iter().filter(chosen).collect();
    if targets.is_empty() {
        eprintln!("the targets are {}", TARGETS.map(|target| target.name).join(", "));
        return ExitCode::from(2);
    }
    if let Some(file) = file {
        let bytes = std::fs::read(&file).unwrap();
        targets.iter().for_each(|target| (target.run)(&bytes));
        return ExitCode::SUCCESS;
    }
    let found = targets.iter().filter(|target| !fuzz(target, Duration::from_secs(seconds), seed)).count();
    ExitCode::from(u8::from(found > 0))
}

/// Run a target for a time; `false` on a finding.
fn fuzz(target: &Target, time: Duration, seed: u64) -> bool {
    let (seeds, mut random) = ((target.seeds)(), Random::new(seed));
    let (started, mut count) = (Instant::now(), 0u64);
    while started.elapsed() < time {
        let bytes = input(&seeds, &mut random);
        let begun = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| (target.run)(&bytes)));
        if result.is_err() || begun.elapsed() > SLOW {
            let file = format!("finding-{}-{seed}-{count}", target.name);
            std::fs::write(&file, &bytes).unwrap();
            eprintln!("{}: a finding after {count} inputs ({:?}): {file}", target.name, begun.elapsed());
            return false;
        }
        count += 1;
    }
    println!("{}: {count} inputs, no finding", target.name);
    true
}
