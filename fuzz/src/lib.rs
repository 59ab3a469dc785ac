//! Fuzz targets: parsers, what the host takes from a guest, and whole operations over images in memory.
//!
//! A target is a function of bytes that panics on a finding. `make fuzz` drives them with libFuzzer and its coverage (the
//! feature `libfuzzer`, see `docs/fuzzing.md`); the tests run them over the corpus and over a sample with a fixed seed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap)]

pub mod corpus;
pub mod engine;
pub mod generator;
pub mod host;
pub mod operations;
pub mod parsers;
pub mod vmdk;

/// What is fuzzed.
pub struct Target {
    /// What it is called: its [corpus] as well.
    pub name: &'static str,
    /// Panics on a finding.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// An input is a list of records of this many bytes, or anything (1).
    pub record: usize,
    /// Longest input in bytes.
    pub longest: usize,
}

/// Seeds of the operations: one for each of their images, with and without a change.
fn operation_seeds() -> Vec<Vec<u8>> {
    let mut random = generator::Random::new(5);
    let mut record = |images: u8| {
        let mut bytes: Vec<u8> = (0..operations::CHANGE).map(|_| random.number() as u8).collect();
        bytes[0] = images;
        // Few changes cut the file.
        bytes[7] &= 0x7f;
        bytes
    };
    (0..64).map(|images| [record(images), record(0)].concat()[..16 * (1 + usize::from(images) % 2)].to_vec()).collect()
}

/// All targets.
pub const TARGETS: [Target; 12] = [
    Target { name: "qcow2-header", run: parsers::header, seeds: parsers::header_seeds, record: 1, longest: 4096 },
    Target { name: "qcow2-tables", run: parsers::all_tables, seeds: parsers::table_seeds, record: 1, longest: 1024 },
    Target { name: "decompress", run: parsers::decompress, seeds: parsers::stream_seeds, record: 1, longest: 4096 },
    Target { name: "vmdk-format", run: vmdk::header, seeds: vmdk::header_seeds, record: 1, longest: 4096 },
    Target { name: "host", run: host::host, seeds: host::seeds, record: 1, longest: 4096 },
    Target { name: "elf", run: engine::elf, seeds: engine::elf_seeds, record: 1, longest: engine::ELF_BYTES },
    Target { name: "messages", run: engine::messages, seeds: engine::message_seeds, record: 1, longest: 2048 },
    Target { name: "requests", run: engine::requests, seeds: engine::request_seeds, record: 12, longest: 768 },
    Target {
        name: "qcow2-commit",
        run: operations::qcow2_commit,
        seeds: operation_seeds,
        record: operations::CHANGE,
        longest: 96,
    },
    Target {
        name: "cross-commit",
        run: operations::cross_commit,
        seeds: operation_seeds,
        record: operations::CHANGE,
        longest: 96,
    },
    Target {
        name: "vmdk-commit",
        run: operations::vmdk_commit,
        seeds: operation_seeds,
        record: operations::CHANGE,
        longest: 96,
    },
    Target { name: "look", run: operations::look, seeds: operation_seeds, record: operations::CHANGE, longest: 96 },
];
