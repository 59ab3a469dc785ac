//! Two images of a format that records its parents, or three that are committed at once: their commit as the product does it, and
//! what they read as.

use crate::{FormatKit, ANCESTOR, MIDDLE, OVERLAY};
use instar_guest_abi::{device_flags, DeviceConfig, DeviceRole, DEVICE_OUTPUT};
use instar_guest_commit::{commit, Commit, CommitFailure, Options, Outcome, Step};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{BlockIo, Source};
use instar_guest_view::{Ancestors, Layers};
use std::collections::BTreeMap;

/// Content by device.
pub type Files = BTreeMap<u32, Vec<u8>>;

/// The images of a commit, each made by `build`.
pub fn built<S>(build: impl Fn(&S) -> Vec<u8>, overlay: &S, backing: &S, ancestor: Option<&S>) -> Files {
    let mut files: Files = [(OVERLAY, build(overlay)), (DEVICE_OUTPUT, build(backing))].into();
    files.extend(ancestor.map(|image| (ANCESTOR, build(image))));
    files
}

/// Commit the overlay, and [`MIDDLE`] if it is there, into the backing. No file may become longer than `max_length` bytes.
///
/// # Errors
/// What the driver or the commit refuses, or fails at.
pub fn run(
    kit: &dyn FormatKit,
    io: &mut MemoryDevices,
    options: Options,
    max_length: u64,
) -> Result<Outcome, CommitFailure> {
    let config = |(&number, bytes): (&u32, &Vec<u8>)| (number, device(kit, number, bytes, max_length));
    let configs = io.files.iter().map(config).collect();
    run_on(kit, io, options, &configs)
}

/// [`run`], with overlay and backing on devices that keep their length.
///
/// # Errors
/// As [`run`].
pub fn run_fixed(kit: &dyn FormatKit, io: &mut MemoryDevices, options: Options) -> Result<Outcome, CommitFailure> {
    let config = |(&number, bytes): (&u32, &Vec<u8>)| {
        let flags = if [OVERLAY, DEVICE_OUTPUT].contains(&number) { device_flags::FIXED_LENGTH } else { 0 };
        (number, DeviceConfig { flags, ..device(kit, number, bytes, bytes.len() as u64) })
    };
    let configs = io.files.iter().map(config).collect();
    run_on(kit, io, options, &configs)
}

fn run_on(
    kit: &dyn FormatKit,
    io: &mut MemoryDevices,
    options: Options,
    configs: &BTreeMap<u32, DeviceConfig>,
) -> Result<Outcome, CommitFailure> {
    let at = |error| CommitFailure { step: Step::Check, error };
    match configs.get(&MIDDLE) {
        None => io.hold_commit(&configs[&OVERLAY], options.keep_overlay, &configs[&DEVICE_OUTPUT]),
        // Only the lowest of the merged layers records its parent.
        Some(between) => io.hold([
            (DeviceRole::Overlay { emptied: false, identity: true }, between),
            (DeviceRole::Target, &configs[&DEVICE_OUTPUT]),
        ]),
    }
    let open = |io: &mut dyn BlockIo, config: &DeviceConfig| kit.open_source(io, config).map_err(at);
    let mut source: Box<dyn Source> = open(io, &configs[&OVERLAY])?;
    if let Some(config) = configs.get(&MIDDLE) {
        source = Box::new(Layers::new(vec![source, open(io, config)?]));
    }
    let has_backing = configs.contains_key(&ANCESTOR);
    let mut sink = kit.open_sink(io, &configs[&DEVICE_OUTPUT], has_backing).map_err(at)?;
    let layers: Result<Vec<_>, _> = configs.get(&ANCESTOR).map(|config| open(io, config)).into_iter().collect();
    let mut below = Ancestors::new(layers?);
    let mut images = Commit { source: source.as_mut(), sink: sink.as_mut(), below: &mut below };
    commit(io, &mut images, options, &mut |_| {})
}

/// What the host would tell the guest of an image.
fn device(kit: &dyn FormatKit, number: u32, bytes: &[u8], max_length: u64) -> DeviceConfig {
    let info = kit.info(bytes);
    DeviceConfig {
        device: number,
        file_length: bytes.len() as u64,
        max_length,
        virtual_size: info.virtual_size,
        cluster_size: info.cluster_size,
        ..DeviceConfig::default()
    }
}

/// What backing and overlay read as.
pub fn views(kit: &dyn FormatKit, files: &Files) -> (Vec<u8>, Vec<u8>) {
    let below = files.get(&ANCESTOR).map(|bytes| kit.content(bytes, None));
    let backing = kit.content(&files[&DEVICE_OUTPUT], below.as_deref());
    let middle = files.get(&MIDDLE).map_or_else(|| backing.clone(), |bytes| kit.content(bytes, Some(&backing)));
    (backing, kit.content(&files[&OVERLAY], Some(&middle)))
}

/// What [`views`] are after a commit, which may let the backing grow.
pub fn expected(kit: &dyn FormatKit, files: &Files) -> (Vec<u8>, Vec<u8>) {
    let (mut backing, overlay) = views(kit, files);
    if backing.len() < overlay.len() {
        backing.resize(overlay.len(), 0);
    }
    backing[..overlay.len()].copy_from_slice(&overlay);
    (backing, overlay)
}

/// The image whose parent is the backing.
pub fn lowest(files: &Files) -> &[u8] {
    files.get(&MIDDLE).unwrap_or(&files[&OVERLAY])
}

/// Whatever backing the engine lets go with the lowest layer, the overlay reads the same: the one that a crash left, and the
/// one of before, which may have been restored from a backup.
pub fn assert_goes_with_none_but(kit: &dyn FormatKit, now: &Files, before: &Files, overlay: &[u8]) {
    assert!(kit.goes_with(lowest(now), &now[&DEVICE_OUTPUT]), "the backing is not that of the layer above");
    let mut restored = now.clone();
    restored.insert(DEVICE_OUTPUT, before[&DEVICE_OUTPUT].clone());
    if kit.goes_with(lowest(now), &restored[&DEVICE_OUTPUT]) {
        assert!(views(kit, &restored).1 == overlay, "a restored backing is taken for that of an interrupted commit");
    }
}
