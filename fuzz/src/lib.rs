//! Fuzz targets, and a generator that drives them for as long as one likes (`make fuzz`). A sample with a fixed seed runs
//! with the tests.
//!
//! A target is a function of bytes that panics on a finding, so that a coverage-guided fuzzer can drive it as well.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation)]

pub mod commit;
pub mod generator;
pub mod parsers;
pub mod vmdk;

/// What is fuzzed.
pub struct Target {
    /// What it is called on the command line.
    pub name: &'static str,
    /// Panics on a finding.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: [Target; 7] = [
    Target { name: "header", run: parsers::header, seeds: parsers::header_seeds },
    Target { name: "tables", run: parsers::tables, seeds: parsers::table_seeds },
    Target { name: "snapshots", run: parsers::snapshots, seeds: parsers::table_seeds },
    Target { name: "decompress", run: parsers::decompress, seeds: parsers::stream_seeds },
    Target { name: "commit", run: commit::commit, seeds: commit::seeds },
    Target { name: "vmdk-header", run: vmdk::header, seeds: vmdk::header_seeds },
    Target { name: "vmdk-commit", run: vmdk::commit, seeds: commit::seeds },
];
