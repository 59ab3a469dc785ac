//! Fuzz targets: parsers, what the host takes from a guest, and whole operations over images in memory.
//!
//! A target is a function of bytes that panics on a finding. `make fuzz` drives them with libFuzzer and its coverage (the
//! feature `libfuzzer`, see `docs/fuzzing.md`); the tests run them over the corpus and over a sample with a fixed seed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap)]

pub mod corpus;
pub mod engine;
pub mod formats;
pub mod generator;
pub mod host;
pub mod operations;
pub mod parallels;
pub mod parsers;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

use instar_guest_sdk::random::Random;

/// A function of bytes that panics on a finding.
pub type Run = dyn Fn(&[u8]) + Send + Sync;

/// What is fuzzed.
pub struct Target {
    /// What it is called: its [corpus] as well.
    pub name: String,
    /// Panics on a finding.
    pub run: Box<Run>,
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// An input is a list of records of this many bytes, or anything (1).
    pub record: usize,
    /// Longest input in bytes.
    pub longest: usize,
}

/// Seeds of the operations: one for each of their images, with and without a change.
fn operation_seeds() -> Vec<Vec<u8>> {
    let mut random = Random::seeded(5);
    let mut record = |images: u8| {
        let mut bytes: Vec<u8> = (0..operations::CHANGE).map(|_| random.byte()).collect();
        bytes[0] = images;
        // Few changes cut the file.
        bytes[7] &= 0x7f;
        bytes
    };
    (0..96).map(|images| [record(images), record(0)].concat()[..16 * (1 + usize::from(images) % 2)].to_vec()).collect()
}

impl Target {
    fn new(
        name: &str,
        run: impl Fn(&[u8]) + Send + Sync + 'static,
        seeds: fn() -> Vec<Vec<u8>>,
        longest: usize,
    ) -> Self {
        Self { name: name.to_owned(), run: Box::new(run), seeds, record: 1, longest }
    }

    /// One whose inputs are lists of changes to images.
    fn operation(name: &str, run: impl Fn(&[u8]) + Send + Sync + 'static) -> Self {
        Self { record: operations::CHANGE, ..Self::new(name, run, operation_seeds, 96) }
    }
}

/// All targets: those of parsers and engine, a commit for each kind of [`Pairs`](operations::Pairs), a look at all images, and what
/// else is done with them.
#[must_use]
pub fn targets() -> Vec<Target> {
    let mut targets = vec![
        Target::new("qcow2-header", parsers::header, parsers::header_seeds, 4096),
        Target::new("qcow2-tables", parsers::all_tables, parsers::table_seeds, 1024),
        Target::new("decompress", parsers::decompress, parsers::stream_seeds, 4096),
        Target::new("parallels-format", parallels::parts, parallels::seeds, 4096),
        Target::new("vdi-format", vdi::header, vdi::header_seeds, 4096),
        Target::new("vmdk-format", vmdk::header, vmdk::header_seeds, 4096),
        Target::new("vhd-format", vhd::header, vhd::header_seeds, 4096),
        Target::new("vhdx-format", vhdx::parts, vhdx::part_seeds, 16 << 10),
        Target::new("host", host::host, host::seeds, 4096),
        Target::new("elf", engine::elf, engine::elf_seeds, engine::ELF_BYTES),
        Target::new("messages", engine::messages, engine::message_seeds, 2048),
        Target { record: 12, ..Target::new("requests", engine::requests, engine::request_seeds, 768) },
    ];
    let commit = |pairs| move |input: &[u8]| operations::run_changed(pairs, input);
    targets.extend(operations::Pairs::all().iter().map(|pairs| Target::operation(&pairs.target, commit(pairs))));
    targets.push(Target::operation("look", operations::look));
    let job = |job| move |input: &[u8]| operations::run_job(job, input);
    targets.extend(operations::Job::ALL.map(|which| Target::operation(which.name(), job(which))));
    targets
}
