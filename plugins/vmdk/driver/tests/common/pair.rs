//! A pair of images, its commit as the product does it, and what both read as.

use super::{build, device, Spec, View};
use instar_guest_commit::{commit, Ancestors, Commit, CommitFailure, Options, Outcome, Step};
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{FormatDriver, Source};
use instar_vmdk_driver::Vmdk;
use std::collections::BTreeMap;

pub const OVERLAY: u32 = 0;
pub const ANCESTOR: u32 = 1;
pub type Files = BTreeMap<u32, Vec<u8>>;

pub fn files(overlay: &Spec, backing: &Spec, ancestor: Option<&Spec>) -> Files {
    let mut files: Files = [(OVERLAY, build(overlay)), (DEVICE_OUTPUT, build(backing))].into();
    files.extend(ancestor.map(|spec| (ANCESTOR, build(spec))));
    files
}

/// No file may become longer than `max_length` bytes.
pub fn run(io: &mut MemoryDevices, options: Options, max_length: u64) -> Result<Outcome, CommitFailure> {
    let at = |error| CommitFailure { step: Step::Check, error };
    let config = |(&number, bytes): (&u32, &Vec<u8>)| (number, device(number, bytes, max_length));
    let configs: BTreeMap<u32, _> = io.files.iter().map(config).collect();
    let mut source = Vmdk::open_source(io, &configs[&OVERLAY]).map_err(at)?;
    let mut sink = Vmdk::open_sink(io, &configs[&DEVICE_OUTPUT], configs.contains_key(&ANCESTOR)).map_err(at)?;
    let mut layers: Vec<Box<dyn Source>> = Vec::new();
    if let Some(config) = configs.get(&ANCESTOR) {
        layers.push(Box::new(Vmdk::open_source(io, config).map_err(at)?));
    }
    let mut below = Ancestors::new(layers);
    let mut images = Commit { source: &mut source, sink: &mut sink, below: &mut below };
    commit(io, &mut images, options, &mut |_| {})
}

/// What backing and overlay read as.
pub fn views(files: &Files) -> (Vec<u8>, Vec<u8>) {
    let below = files.get(&ANCESTOR).map_or_else(Vec::new, |bytes| View::new(bytes).content(&[]));
    let backing = View::new(&files[&DEVICE_OUTPUT]).content(&below);
    let overlay = View::new(&files[&OVERLAY]).content(&backing);
    (backing, overlay)
}
