//! Two images, or three that are committed at once, their commit as the product does it, and what they read as.

use super::{build, device, Spec, View};
use instar_guest_commit::{commit, Commit, CommitFailure, Options, Outcome, Step};
use instar_guest_sdk::abi::{Part, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{FormatDriver, Source};
use instar_guest_view::{Ancestors, Layers};
pub use instar_testkit::{ANCESTOR, MIDDLE, OVERLAY};
use instar_vdi_driver::Vdi;
use std::collections::BTreeMap;

/// Content by device.
pub type Files = BTreeMap<u32, Vec<u8>>;

/// The images of a commit, built.
pub fn files(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) -> Files {
    let mut files: Files = [(OVERLAY, build(overlay)), (DEVICE_OUTPUT, build(backing))].into();
    files.extend(ancestor.map(|spec| (ANCESTOR, build(spec))));
    files
}

/// Commit the overlay, and [`MIDDLE`] if it is there, into the backing. No file may become longer than `max_length` bytes.
///
/// # Errors
/// What the drivers or the commit refuse, or fail at.
pub fn run(io: &mut MemoryDevices, options: Options, max_length: u64) -> Result<Outcome, CommitFailure> {
    let at = |error| CommitFailure { step: Step::Check, error };
    let config = |(&number, bytes): (&u32, &Vec<u8>)| (number, device(number, bytes, max_length));
    let configs: BTreeMap<u32, _> = io.files.iter().map(config).collect();
    match configs.get(&MIDDLE) {
        None => io.hold_commit(&configs[&OVERLAY], options.keep_overlay, &configs[&DEVICE_OUTPUT]),
        // Only the lowest of the merged layers records its parent.
        Some(between) => io.hold([
            (Part::Overlay { emptied: false, identity: true }, between),
            (Part::Target, &configs[&DEVICE_OUTPUT]),
        ]),
    }
    let mut source: Box<dyn Source> = Box::new(Vdi::open_source(io, &configs[&OVERLAY]).map_err(at)?);
    if let Some(config) = configs.get(&MIDDLE) {
        source = Box::new(Layers::new(vec![source, Box::new(Vdi::open_source(io, config).map_err(at)?)]));
    }
    let mut sink = Vdi::open_sink(io, &configs[&DEVICE_OUTPUT], configs.contains_key(&ANCESTOR)).map_err(at)?;
    let mut layers: Vec<Box<dyn Source>> = Vec::new();
    if let Some(config) = configs.get(&ANCESTOR) {
        layers.push(Box::new(Vdi::open_source(io, config).map_err(at)?));
    }
    let mut below = Ancestors::new(layers);
    let mut images = Commit { source: source.as_mut(), sink: &mut sink, below: &mut below };
    commit(io, &mut images, options, &mut |_| {})
}

/// What backing and overlay read as.
pub fn views(files: &Files) -> (Vec<u8>, Vec<u8>) {
    let below = files.get(&ANCESTOR).map_or_else(Vec::new, |bytes| View::new(bytes).content(&[]));
    let backing = View::new(&files[&DEVICE_OUTPUT]).content(&below);
    let middle = files.get(&MIDDLE).map_or_else(|| backing.clone(), |bytes| View::new(bytes).content(&backing));
    (backing, View::new(&files[&OVERLAY]).content(&middle))
}

/// The image whose parent is the backing.
pub fn lowest(files: &Files) -> View<'_> {
    View::new(files.get(&MIDDLE).unwrap_or(&files[&OVERLAY]))
}

/// Whatever backing the engine lets go with the lowest layer, the overlay reads the same: the one that a crash left, and the
/// one of before, which may have been restored from a backup.
pub fn assert_goes_with_none_but(now: &Files, before: &Files, overlay: &[u8]) {
    assert!(lowest(now).goes_with(&View::new(&now[&DEVICE_OUTPUT])), "the backing is not that of the layer above");
    let mut restored = now.clone();
    restored.insert(DEVICE_OUTPUT, before[&DEVICE_OUTPUT].clone());
    if lowest(now).goes_with(&View::new(&restored[&DEVICE_OUTPUT])) {
        assert!(views(&restored).1 == overlay, "a restored backing is taken for that of an interrupted commit");
    }
}
