//! `instar-chains SEED COUNT [FIRST]`: commits drawn chains of all formats. Prints figures and every finding; exit code 1 if there
//! is one.
#![allow(missing_docs, clippy::print_stdout)]

use instar_fuzz::operations::{drawn_chain, DrawnChain};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Mutex;

fn main() -> ExitCode {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let (seed, count) = (numbers.first().copied().unwrap_or(1), numbers.get(1).copied().unwrap_or(2_000));
    let first = numbers.get(2).copied().unwrap_or(0);
    let (next, chains) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    let work = || loop {
        let number = next.fetch_add(1, Relaxed);
        if number >= first + count {
            return;
        }
        let chain = drawn_chain(seed, number);
        if let Some(finding) = &chain.finding {
            println!("finding, seed {seed}, {finding}");
        }
        if let Ok(mut chains) = chains.lock() {
            chains.push(chain);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let chains: Vec<DrawnChain> = chains.into_inner().unwrap_or_default();
    let mut pairs: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut depths: BTreeMap<usize, usize> = BTreeMap::new();
    for chain in chains.iter().filter(|chain| chain.admitted) {
        *pairs.entry((chain.formats[0], chain.formats[chain.target])).or_default() += 1;
        *depths.entry(chain.formats.len() - 1).or_default() += 1;
    }
    pairs.iter().for_each(|((overlay, backing), count)| println!("chains: {overlay} into {backing}: {count}"));
    let admitted = chains.iter().filter(|chain| chain.admitted).count();
    let findings = chains.iter().filter(|chain| chain.finding.is_some()).count();
    println!("chains: seed {seed}, {} chains, {admitted} of them committed, by depth {depths:?}", chains.len());
    println!("chains: {findings} findings");
    ExitCode::from(u8::from(findings > 0))
}
