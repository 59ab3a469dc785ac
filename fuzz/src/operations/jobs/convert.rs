//! The chain becomes a new image of any format, as `instar convert` makes one.

use super::{is_kept, Ended, Outcome, Trial};
use crate::formats::{Format, FORMATS};
use crate::host;
use crate::operations::bounded_devices::BoundedDevices;
use crate::operations::{config, open_sink, open_source};
use instar_guest_abi::{device_flags, DeviceRole};
use instar_guest_commit::{commit, Commit, CommitFailure, Options, Step};
use instar_guest_convert::{Disks, Filled, NonZero, Sparse};
use instar_guest_sdk::Source;
use instar_guest_view::{Ancestors, Filtered, Layers};
use instar_plugin_api::{Context, CreateSpec, Incoming, Role};
use instar_testkit::{seen, LONGEST, SECTOR};

/// The device of the new image while it is made here: none of the chain's.
pub(super) const TARGET: u32 = 77;

/// An empty image of a format, if its plugin makes one that is one file.
pub(super) fn created(format: &Format, size: u64) -> Option<Vec<u8>> {
    let spec = CreateSpec {
        virtual_size: size,
        file_name: b"new".to_vec().into(),
        backing: None.into(),
        backing_facts: None.into(),
        options: Vec::new().into(),
    };
    let image = (format.create)(&spec).ok().filter(|image| image.files.is_empty() && image.length <= 2 * LONGEST)?;
    let mut bytes = vec![0; image.length as usize];
    for region in &image.regions {
        let at = region.offset as usize;
        bytes[at..at + region.bytes.len()].copy_from_slice(&region.bytes);
    }
    Some(bytes)
}

pub fn run(trial: &mut Trial<'_>, mut io: BoundedDevices) -> Outcome {
    let chain = trial.fixture.chain();
    let format = &FORMATS[trial.random.index(FORMATS.len())];
    let size = trial.facts[&chain[0]].virtual_size;
    if format.packed || !format.kit.has_sink() || size > LONGEST || !trial.admits(chain) {
        return Ok(None);
    }
    let Some(new) = trial.target.clone().or_else(|| created(format, size)) else { return Ok(None) };
    let facts = host::look(format, &new).ok_or("the plugin does not know the image that it made")?;
    let holds_data = trial.target.is_some();
    let incoming = Incoming::from_layers(chain.iter().map(|device| &trial.facts[device]));
    let Some(incoming) = incoming else { return Ok(None) };
    let verdict = host::verdict(format, Role::Write, &facts, &Context::writing(None, incoming));
    if verdict.code != 0 {
        return Ok(None);
    }
    let mut target = config(TARGET, &facts, true, verdict.max_length.max(facts.file_length));
    if facts.compresses && trial.random.index(2) == 0 {
        target.flags |= device_flags::COMPRESS;
    }
    let least = *trial.random.pick(&[0, 0, 512, 4096, 65536]);
    io.devices.files.insert(TARGET, new);
    io.devices.hold([(DeviceRole::Target, &target)]);
    let planning = |error| (true, error);
    let options = Options { keep_overlay: true, ..Options::default() };
    let result = trial.open_all(&mut io, chain).map_err(planning).and_then(|layers| {
        let mut sink = open_sink(format, &mut io, &target, false).map_err(planning)?;
        let mut disks = Disks::new(vec![Layers::new(layers)]).map_err(planning)?;
        let mut below = Ancestors::new(Vec::new());
        let whole = sink.info().virtual_size.max(size);
        let mut source: Box<dyn Source + '_> = if holds_data {
            Box::new(Filtered::by(Filled::new(whole, false), &mut disks as &mut dyn Source))
        } else {
            Box::new(Filtered::by(NonZero::default(), &mut disks as &mut dyn Source))
        };
        if least != 0 {
            source = Box::new(Filtered::by(Sparse::new(least, !holds_data), source));
        }
        let source = source.as_mut();
        let mut images = Commit { source, sink: sink.as_mut(), below: &mut below };
        let done = commit(&mut io, &mut images, options, &mut |_| {});
        let plans = |step| matches!(step, Step::Check | Step::Plan);
        done.map(drop).map_err(|CommitFailure { step, error }| (plans(step), error))
    });
    if trial.files.iter().any(|(device, bytes)| io.devices.files[device] != *bytes) {
        return Err("an image that is only read has changed".into());
    }
    let mut compared = false;
    if result.is_ok() {
        let bytes = &io.devices.files[&TARGET];
        // The testkits' checkers know only images like those of the testkits.
        let made = host::look(format, bytes).ok_or("the plugin does not know the new image")?;
        let mut alone = BoundedDevices::look([(TARGET, bytes.clone())].into());
        let checked = open_source(format, &mut alone, &config(TARGET, &made, false, 0))
            .and_then(|mut source| source.check(&mut alone, &mut |_, _| ()));
        if format.kit.has_metadata()
            && checked.as_ref().map_or(true, |found| found.corruptions > 0 || (found.leaks > 0 && !holds_data))
        {
            return Err(format!("the new {format:?}: {checked:?}"));
        }
        if let Some(before) = trial.view(trial.files, chain) {
            let after =
                format.kit.salvage(bytes).and_then(|disk| seen(&[&disk])).ok_or("the new image cannot be read")?;
            is_kept(&before, &after, before.length / SECTOR, "the new image")?;
            compared = true;
        }
    }
    Ok(Some(Ended { io, result, compared }))
}
