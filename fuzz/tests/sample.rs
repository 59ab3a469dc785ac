//! Each target over the corpus in the repository, and over a sample with a fixed seed.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use instar_fuzz::generator::input;
use instar_fuzz::{corpus, targets};
use instar_guest_sdk::random::Random;

#[test]
fn the_corpus_has_no_finding() {
    for target in targets() {
        let inputs = corpus::load(&target.name).unwrap_or_else(|error| panic!("{}: {error}", target.name));
        assert!(inputs.len() > 5, "{} has a corpus of {} inputs", target.name, inputs.len());
        for (number, input) in inputs.iter().enumerate() {
            // The line is what a failure has to show.
            println!("{}: line {} {:?}", target.name, number + 1, input.finding);
            (target.run)(&input.bytes);
        }
    }
}

#[test]
fn a_sample_has_no_finding() {
    for target in targets() {
        let (seeds, mut random) = ((target.seeds)(), Random::seeded(2026));
        assert!(!seeds.is_empty());
        let count = match target.name.as_str() {
            // Each of its images has many MiB.
            "vhdx-commit" => 300,
            "messages" => 1500,
            // Each has the images of all targets.
            "resize" | "rebase" | "convert" | "repair" => 60,
            // Commits: `make fuzz` and the campaigns make more of them.
            _ if target.record > 1 => 200,
            _ => 8_000,
        };
        for _ in 0..count {
            let mut bytes = input(&seeds, &mut random);
            bytes.truncate(target.longest);
            (target.run)(&bytes);
        }
    }
}
