//! The whole guest operation over images in memory with a few fields changed.
//!
//! Nothing panics, whatever the images say. A commit that is refused before its first change has changed nothing; one
//! that fails later has not touched the overlay. One that succeeds has not changed what the overlay reads, if the images
//! made sense.

use self::common::builder::{Spec, State};
use self::common::checker::{check, snapshots};
use self::common::pair::{data, views, Pair};
use self::common::{be32, be64, config, ANCESTOR, OVERLAY};
use instar_guest_abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_commit::{Ancestors, Commit, CommitFailure, Options, Outcome, Step};
use instar_guest_sdk::memory::{Change, MemoryDevices};
use instar_guest_sdk::{FormatDriver, Source};
use instar_qcow2_driver::Qcow2;
use std::cell::Cell;
use std::panic::{catch_unwind, set_hook, take_hook, AssertUnwindSafe};
use std::sync::{Once, OnceLock};
use std::thread::Result as Caught;

#[path = "../../plugins/qcow2/driver/tests/common/mod.rs"]
mod common;

/// Bytes of an input for each change: which file and which part of it, where, how, and a value.
pub const CHANGE: usize = 16;
/// No file may become longer than this, in bytes.
pub const MAX_LENGTH: u64 = 64 << 20;

/// Pairs that make sense, of many kinds.
fn pairs() -> &'static [Pair] {
    static PAIRS: OnceLock<Vec<Pair>> = OnceLock::new();
    PAIRS.get_or_init(|| {
        let mut pairs = Vec::new();
        for (bits, top, snapshots, order, version, extended) in [
            (9, 9, 0, 4, 3, false),
            (9, 10, 1, 3, 3, false),
            (12, 9, 0, 6, 3, false),
            (10, 10, 2, 4, 2, false),
            (14, 9, 1, 4, 3, true),
        ] {
            let size = 96u64 << bits;
            let overlay =
                Spec::new(top, size).with(data([0, 1, 5, 40], 0x21)).with([(7, State::Zero), (9, State::Deflated(3))]);
            let backing =
                Spec { snapshots, refcount_order: order, version, extended, free: 2, ..Spec::new(bits, size) };
            let mut pair = Pair::new(&overlay, &backing.with(data([0, 3, 40], 0x43)).with([(2, State::Deflated(5))]));
            pair.ancestor = Some(common::builder::build(&Spec::new(bits, size).with(data(0..20, 0x66))));
            pairs.push(pair);
        }
        pairs
    })
}

/// Inputs: changes of random fields.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let mut random = super::generator::Random::new(5);
    (0..64).map(|pair| (0..CHANGE * 3).map(|at| if at == 0 { pair } else { random.number() as u8 }).collect()).collect()
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Call something that may panic, and say nothing of that.
pub fn quietly<T>(call: impl FnOnce() -> T) -> Caught<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    QUIET.set(false);
    result
}

/// Commit a pair of images after the changes that the input describes.
pub fn commit(input: &[u8]) {
    let Some(&which) = input.first() else { return };
    let pair = &pairs()[usize::from(which) % pairs().len()];
    let mut files = pair.io().files;
    for change in input.chunks_exact(CHANGE).take(4) {
        let device = if change[1] % 2 == 0 { OVERLAY } else { DEVICE_OUTPUT };
        apply(files.get_mut(&device).unwrap(), change, Order::Big);
    }
    // The host has looked at the headers before.
    if files.values().any(|bytes| &bytes[..4] != b"QFI\xfb" || !(9..=21).contains(&be32(bytes, 20))) {
        return;
    }
    // The checker takes the tables as long as the header says.
    let small =
        files.values().all(|b| be64(b, 24) <= 4 << 20 && be32(b, 36) < 4096 && be32(b, 56) < 64 && be32(b, 60) < 8);
    // What makes no sense cannot be compared with anything.
    let before = quietly(|| {
        let short = |bytes: &[u8]| snapshots(bytes).0.iter().all(|&(_, l1_entries)| l1_entries < 4096);
        let makes_sense = |device| small && short(&files[&device]) && check(&files[&device]).errors.is_empty();
        (makes_sense(OVERLAY) && makes_sense(DEVICE_OUTPUT)).then(|| views(&files).1)
    });
    let mut io = MemoryDevices::new(files.clone());
    match run(&mut io) {
        Ok(_) => {
            if let Ok(Some(overlay)) = before {
                assert!(views(&io.files).1 == overlay, "the overlay reads something else");
                assert_eq!(check(&io.files[&OVERLAY]).errors, Vec::<String>::new());
                assert_eq!(check(&io.files[&DEVICE_OUTPUT]).errors, Vec::<String>::new());
            }
        }
        Err(failure) => {
            assert_ne!(failure.error.code, ErrorCode::InternalOverflow, "{}", failure.error);
            if matches!(failure.step, Step::Check | Step::Plan) {
                assert_eq!(io.log, vec![], "{:?} {}", failure.step, failure.error);
            } else {
                assert!(failure.step == Step::Empty || !overlay_changed(&io), "{:?} {}", failure.step, failure.error);
            }
        }
    }
}

/// Whether anything was written to the overlay.
pub fn overlay_changed(io: &MemoryDevices) -> bool {
    let of_overlay =
        |c: &Change| matches!(c, Change::Write { device: OVERLAY, .. } | Change::SetLength { device: OVERLAY, .. });
    io.log.iter().any(of_overlay)
}

/// The order of the bytes of a format's numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The first is the highest: qcow2.
    Big,
    /// The first is the lowest: vmdk.
    Little,
}

/// Change a field: bytes 2 and 3 say in which part of the file, 4 to 6 where, 7 how, 8 to 15 the value.
pub fn apply(bytes: &mut [u8], change: &[u8], order: Order) {
    let field = |at: usize| usize::from(change[at]) << 8 | usize::from(change[at + 1]);
    let end = match change[2] % 4 {
        0 => 144,
        1 => bytes.len().min(16 << 9),
        _ => bytes.len(),
    };
    let width = [1, 2, 4, 8][usize::from(change[7] % 4)];
    let at = (field(3) << 8 | field(5)) % (end - 8) / width * width;
    let value = u64::from_be_bytes(change[8..].try_into().unwrap());
    let value = match change[7] / 4 % 8 {
        0 => value,
        1 => value >> (value % 64),
        2 => (value % 256) << 9,
        3 => (value % 64) << 14,
        4 => be64(bytes, at) ^ 1 << (value % 64),
        5 => be64(bytes, value as usize % (bytes.len() - 8) / 8 * 8),
        6 => u64::MAX,
        _ => 0,
    };
    match order {
        Order::Big => bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]),
        Order::Little => bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]),
    }
}

/// As the product does it, with a limit on the length of files.
fn run(io: &mut MemoryDevices) -> Result<Outcome, CommitFailure> {
    let at = |error| CommitFailure { step: Step::Check, error };
    let limited = |io: &MemoryDevices, device| {
        let mut config = config(io, device);
        config.max_length = MAX_LENGTH;
        config
    };
    let (overlay, backing, ancestor) = (limited(io, OVERLAY), limited(io, DEVICE_OUTPUT), limited(io, ANCESTOR));
    let mut source = Qcow2::open_source(io, &overlay).map_err(at)?;
    let mut sink = Qcow2::open_sink(io, &backing, true).map_err(at)?;
    let layers: Vec<Box<dyn Source>> = vec![Box::new(Qcow2::open_source(io, &ancestor).map_err(at)?)];
    let mut below = Ancestors::new(layers);
    let mut images = Commit { source: &mut source, sink: &mut sink, below: &mut below };
    instar_guest_commit::commit(io, &mut images, Options { resize_backing: true, ..Options::default() }, &mut |_| {})
}
