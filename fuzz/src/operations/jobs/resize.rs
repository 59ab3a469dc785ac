//! An image of a chain gets another size, as `instar resize` gives it one.

use super::{is_kept, Ended, Outcome, Trial};
use crate::host;
use crate::operations::bounded_devices::BoundedDevices;
use crate::operations::{open_sink, Files};
use instar_guest_abi::DeviceRole;
use instar_guest_sdk::resize::{resize, Options, ResizeFailure, Step};
use instar_guest_view::Ancestors;
use instar_plugin_api::{Context, ImageFacts, Incoming, Role};
use instar_testkit::SECTOR;

/// Bytes that are preallocated at most.
const FILLED: u64 = 4 << 20;

pub fn run(trial: &mut Trial<'_>, mut io: BoundedDevices) -> Outcome {
    let chain = trial.fixture.chain();
    let index = trial.random.index(chain.len());
    let (device, below) = (chain[index], &chain[index + 1..]);
    let format = trial.fixture.formats[&device];
    let old = trial.facts[&device].virtual_size;
    let new = trial.size.unwrap_or_else(|| size(trial, old));
    let preallocate = new > old && new - old <= FILLED && trial.random.index(4) == 0;
    if !format.kit.has_sink() || !trial.admits(&chain[index..]) {
        return Ok(None);
    }
    let Some(longest) = admitted(trial, device, below.first().copied(), (old, new), preallocate) else {
        return Ok(None);
    };
    let config = trial.config(device, true, longest);
    io.devices.hold([(DeviceRole::Target, &config)]);
    let planning = |error| (true, error);
    let options = Options { virtual_size: new, preallocate, dry_run: false };
    let result = open_sink(format, &mut io, &config, !below.is_empty()).map_err(planning).and_then(|mut sink| {
        let mut ancestors = Ancestors::new(trial.open_all(&mut io, below).map_err(planning)?);
        let done = resize(&mut io, sink.as_mut(), &mut ancestors, options, &mut |_| {});
        done.map(drop).map_err(|ResizeFailure { step, error }| (step == Step::Plan, error))
    });
    let now = &io.devices.files;
    trial.snapshots_are_kept(device, &now[&device])?;
    let compared = compare(trial, now, &chain[index..], (old, new), result.is_ok())?;
    Ok(Some(Ended { io, result, compared }))
}

/// Another size, in whole sectors.
fn size(trial: &mut Trial<'_>, old: u64) -> u64 {
    let sectors = old / 512;
    let far = trial.random.below(4096);
    let new = match trial.random.index(7) {
        0 => sectors.saturating_sub(1 + far % 16),
        1 => sectors / 2,
        2 => trial.random.below(sectors.max(1)),
        3 => sectors.saturating_add(1),
        4 => sectors.saturating_mul(2),
        5 => sectors.saturating_mul(1 + far % 9),
        _ => sectors.saturating_add(far),
    };
    new.clamp(1, i64::MAX as u64 / 512) * 512
}

/// What the engine asks before it lets a guest do this: how long the file may become.
fn admitted(
    trial: &Trial<'_>,
    device: u32,
    parent: Option<u32>,
    (old, new): (u64, u64),
    preallocate: bool,
) -> Option<u64> {
    let facts = &trial.facts[&device];
    let parent = parent.map(|parent| &trial.facts[&parent]);
    let shown = parent.map_or(0, |parent| parent.virtual_size.min(new).saturating_sub(old));
    let bytes = if preallocate { new.saturating_sub(old) } else { shown };
    let unit = facts.unit();
    let max_clusters = if bytes == 0 { 0 } else { bytes.div_ceil(unit).saturating_add(1) };
    let incoming = Incoming { virtual_size: new.max(old), cluster_size: unit, max_clusters, identity_recorded: false };
    let longest = trial.ask(device, Role::Write, &Context::writing(parent, incoming))?;
    let resized = ImageFacts { virtual_size: new, ..facts.clone() };
    let readable = parent.is_none_or(|parent| {
        let context = Context::reading(Some(parent), false);
        host::verdict(trial.fixture.formats[&device], Role::Read, &resized, &context).code == 0
    });
    readable.then_some(longest)
}

/// Up to the lesser size everything reads as before, and past the old end everything that can be read is zero.
fn compare(trial: &Trial<'_>, now: &Files, chain: &[u32], (old, new): (u64, u64), done: bool) -> Result<bool, String> {
    let Some(before) = trial.view(trial.files, chain) else { return Ok(false) };
    let Some(after) = trial.view(now, chain) else {
        // A disk that has become too long is not compared.
        let long = new.max(old) > instar_testkit::LONGEST;
        return if long { Ok(false) } else { Err("the image cannot be read any more".into()) };
    };
    let whole = before.length.min(after.length) / SECTOR;
    is_kept(&before, &after, whole, "the image")?;
    if !done {
        return Ok(true);
    }
    if (after.length as u64) < new || (new < old && after.length as u64 >= old) {
        return Err(format!("the image has {} bytes, and not {new}", after.length));
    }
    let readable = (0..before.states.len()).all(|sector| before.sector(sector).is_some());
    for sector in before.length.div_ceil(SECTOR)..after.states.len() {
        let zero = after.sector(sector).map(|bytes| bytes.iter().all(|&byte| byte == 0));
        if zero == Some(false) || (zero.is_none() && readable) {
            return Err(format!("past the old end, sector {sector} reads {zero:?}"));
        }
    }
    Ok(true)
}
