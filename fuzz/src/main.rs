//! One target under libFuzzer: the one that `FUZZ_TARGET` names, or the program's own name behind `instar-fuzz-`, as OSS-Fuzz
//! runs it; `list` prints all names, each with the length of its longest inputs. The arguments are libFuzzer's. With `FUZZ_SEEDS`, a directory, the target's first inputs and its corpus are written
//! there; with `FUZZ_PACK`, the files of a directory become the corpus; nothing else is done then.
#![no_main]
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use instar_fuzz::{corpus, targets, Target};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::LazyLock;

/// An allocation of more bytes than this is a finding: the guest's memory is half as large, and so is every file.
const MAX_ALLOCATION: usize = 128 << 20;
/// So are this many bytes at once, besides the images of all targets: the files, what was written to them, what the tests' own checker takes, and the guest.
const MAX_TOTAL: usize = 512 << 20;

static TOTAL: AtomicUsize = AtomicUsize::new(0);
/// Bytes that the images of all targets take, before the first input: no input has anything to do with them.
static BEFORE: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system's allocator, with an end.
struct Bounded;

static REPORTING: AtomicBool = AtomicBool::new(false);

/// Count bytes that are asked for; with too many, say who asked, and end. (An allocator must not panic.)
fn take(bytes: usize) {
    let total = TOTAL.fetch_add(bytes, Relaxed) + bytes;
    let much = total.saturating_sub(BEFORE.load(Relaxed)) > MAX_TOTAL;
    if (bytes > MAX_ALLOCATION || much) && !REPORTING.swap(true, Relaxed) {
        eprintln!("panicked at an allocation of {bytes} bytes, {total} in all\n{}", Backtrace::force_capture());
        std::process::abort();
    }
}

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's contract is ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's contract is ours.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        TOTAL.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's contract is ours.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size);
        TOTAL.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's contract is ours.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

/// What stands behind `instar-fuzz-` in the name of this program, if that is how it is called.
fn name_of_program() -> Option<String> {
    let program = std::env::args_os().next()?;
    let name = std::path::Path::new(&program).file_name()?.to_str()?;
    name.strip_prefix("instar-fuzz-").map(str::to_owned)
}

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_else(|_| name_of_program().unwrap_or_default());
    if name == "list" {
        targets().iter().for_each(|target| println!("{} {}", target.name, target.longest));
        std::process::exit(0);
    }
    let target = targets().into_iter().find(|target| target.name == name).unwrap_or_else(|| {
        let names: Vec<String> = targets().into_iter().map(|target| target.name).collect();
        eprintln!("FUZZ_TARGET is one of {}", names.join(", "));
        std::process::exit(2);
    });
    if let Some(directory) = std::env::var_os("FUZZ_SEEDS").map(std::path::PathBuf::from) {
        for (number, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(directory.join(format!("seed-{number}")), seed).expect("the seeds can be written");
        }
        corpus::unpack(&target.name, &directory).expect("the corpus can be written");
        std::process::exit(0);
    }
    if let Some(directory) = std::env::var_os("FUZZ_PACK").map(std::path::PathBuf::from) {
        let count = corpus::pack(&target.name, &directory).expect("the corpus can be replaced");
        println!("{}: {count} inputs", target.name);
        std::process::exit(0);
    }
    BEFORE.store(TOTAL.load(Relaxed), Relaxed);
    target
});

fuzz_target!(|data: &[u8]| (TARGET.run)(data));

// Inputs that are lists of records stay lists of whole records: mostly the bytes of one of them change.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let (record, seed) = (TARGET.record, seed as usize);
    if record == 1 || size < record || seed % 8 == 0 {
        return fuzzer_mutate(data, size, max_size);
    }
    let records = size / record;
    let at = seed / 64 % records * record;
    match seed / 8 % 8 {
        // One more, a copy of another.
        0 if (records + 1) * record <= max_size.min(data.len()) => {
            data.copy_within(at..at + record, records * record);
            (records + 1) * record
        }
        1 if records > 1 => {
            // The first says which images: it is kept.
            let first = data[0];
            data.copy_within(at + record..records * record, at);
            data[0] = first;
            (records - 1) * record
        }
        _ => {
            let mut one = data[at..at + record].to_vec();
            let length = fuzzer_mutate(&mut one, record, record);
            one[length.min(record)..].fill(0);
            data[at..at + record].copy_from_slice(&one);
            records * record
        }
    }
});
