//! The overlay gets another parent, as `instar rebase` gives it one: a layer further down, none at all, or another image.

use super::{is_kept, Ended, Failure, Outcome, Trial};
use crate::operations::bounded_devices::BoundedDevices;
use crate::operations::{open_sink, open_source, OVERLAY};
use instar_guest_abi::{device_flags, DeviceConfig, DeviceRole, PARENT_ROOM};
use instar_guest_sdk::rebase::{rebase, Content, Rebase, RebaseFailure, Step};
use instar_guest_sdk::{BlockIo, DriverResult, Parent, Source};
use instar_guest_view::{Ancestors, Differences, View};
use instar_plugin_api::{Context, Role};

pub fn run(trial: &mut Trial<'_>, mut io: BoundedDevices) -> Outcome {
    let (chain, facts) = (trial.fixture.chain(), &trial.facts[&OVERLAY]);
    let (format, old) = (trial.fixture.formats[&OVERLAY], &chain[1..]);
    let new = &chain[1 + trial.random.index(chain.len())..];
    let snapshots = !format.kit.salvage_snapshots(&trial.files[&OVERLAY]).is_empty();
    let read = new.first().map(|top| Context::reading(Some(&trial.facts[top]), false));
    let readable = read.is_none_or(|context| trial.ask(OVERLAY, Role::Read, &context).is_some());
    if snapshots || !format.kit.has_sink() || !trial.admits(old) || !trial.admits(new) || !readable {
        return Ok(None);
    }
    let parent = old.first().map(|parent| &trial.facts[parent]);
    let Some(longest) = trial.ask(OVERLAY, Role::Write, &Context::reading(parent, false)) else { return Ok(None) };
    let config = trial.config(OVERLAY, true, longest.max(facts.file_length).saturating_add(PARENT_ROOM));
    let before = trial.view(trial.files, chain);
    // What an interrupted commit has announced would be lost: only the record may change.
    let announced = facts.parent_announced;
    let config = DeviceConfig { flags: config.flags | device_flags::KEEPS_IDENTITY, ..config };
    let result = match go(trial, &mut io, &config, (old, new), true) {
        Ok(bytes) if announced && bytes > 0 => return Ok(None),
        Ok(_) if !io.devices.log.is_empty() => return Err("a dry run changes something".into()),
        Ok(_) => go(trial, &mut io, &config, (old, new), false),
        failed => failed,
    };
    let now = &io.devices.files;
    let through = if result.is_ok() { new } else { old };
    let after = trial.view(now, &[&[OVERLAY], through].concat());
    let compared = match (before, after) {
        (Some(before), Some(after)) => is_kept(&before, &after, before.states.len(), "the overlay").map(|()| true)?,
        (Some(_), None) if trial.view(now, new).is_some() || new.is_empty() => {
            return Err("the overlay cannot be read any more".into());
        }
        _ => false,
    };
    Ok(Some(Ended { io, result: result.map(drop), compared }))
}

/// The layers of a view, each with its device.
fn layers(trial: &Trial<'_>, io: &mut BoundedDevices, devices: &[u32]) -> DriverResult<Vec<(u32, Box<dyn Source>)>> {
    devices.iter().map(|device| Ok((*device, trial.open(io, *device)?))).collect()
}

/// Rebase as `guest/rebase` does: how many bytes are written before the record changes.
fn go(
    trial: &Trial<'_>,
    io: &mut BoundedDevices,
    config: &DeviceConfig,
    (old, new): (&[u32], &[u32]),
    dry_run: bool,
) -> Result<u64, Failure> {
    let planning = |error| (true, error);
    let format = trial.fixture.formats[&OVERLAY];
    let parent = new.first().map(|top| {
        let facts = &trial.facts[top];
        let identity = instar_guest_abi::ImageId::new(facts.identity.as_slice()).filter(|_| !facts.identity.is_empty());
        Parent { name: b"another", format: trial.fixture.formats[top].name, identity, virtual_size: facts.virtual_size }
    });
    io.devices.hold([(DeviceRole::Rebased, config)]);
    let has_backing = parent.is_some() || !old.is_empty();
    let views =
        [View::new(layers(trial, io, old).map_err(planning)?), View::new(layers(trial, io, new).map_err(planning)?)];
    let [before, after] = views;
    let source = open_source(format, io, config).map_err(planning)?;
    let mut sink = open_sink(format, io, config, has_backing).map_err(planning)?;
    let mut below = Ancestors::new(trial.open_all(io, old).map_err(planning)?);
    let mut differences = Differences::new(source, before, after);
    let opener = |io: &mut dyn BlockIo| {
        let file_length = io.length(config.device)?;
        open_source(format, io, &DeviceConfig { file_length, ..*config })
    };
    let content = Content { differences: &mut differences, sink: sink.as_mut(), below: &mut below };
    let mut images = Rebase { overlay: &opener, content: Some(content), parent };
    let done = rebase(io, &mut images, dry_run, &mut |_| {}, &mut |_| {});
    done.map(|plan| plan.bytes)
        .map_err(|RebaseFailure { step, error }| (matches!(step, Step::Check | Step::Plan), error))
}
