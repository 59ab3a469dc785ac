//! Each target over the corpus in the repository, and over a sample with a fixed seed.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use instar_fuzz::generator::{input, Random};
use instar_fuzz::{Target, TARGETS};
use std::path::{Path, PathBuf};

/// The files of a target's corpus: what covers new code, and what was a finding once.
fn corpus(target: &Target) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let entries = std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn the_corpus_has_no_finding() {
    for target in TARGETS {
        let files = corpus(&target);
        assert!(files.len() > 5, "{} has a corpus of {} files", target.name, files.len());
        for file in files {
            // The name is what a failure has to show.
            println!("{}", file.display());
            (target.run)(&std::fs::read(file).unwrap());
        }
    }
}

#[test]
fn a_sample_has_no_finding() {
    for target in TARGETS {
        let (seeds, mut random) = ((target.seeds)(), Random::new(2026));
        assert!(!seeds.is_empty());
        let count = if target.record > 1 || target.name == "messages" { 1500 } else { 10_000 };
        for _ in 0..count {
            let mut bytes = input(&seeds, &mut random);
            bytes.truncate(target.longest);
            (target.run)(&bytes);
        }
    }
}
