//! The damage campaign: pairs of images of which one to three words of metadata are wrong, committed, checked and mapped.
//!
//! Nothing panics, and the work stays in proportion: requests and bytes are counted. A refusal changes no byte. After a
//! commit, the backing reads what the overlay did, and past the end of the overlay what it did itself; whatever happens, the
//! overlay and all snapshots read what they did. A reader of the testkits that takes damaged images tells what that is, sector
//! by sector; a sector that could not be read before may read as anything.

mod draw;

use super::bounded_devices::BoundedDevices;
use super::commit::{admitted, guest, hold};
use super::jobs::{judged, Job};
use super::verdict::{differs, Ending, Verdict};
use super::{config, open_source, quietly, Files, Fixture, OVERLAY};
use crate::host;
use draw::{draw, Drawn};
use instar_guest_abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_commit::{CommitFailure, Outcome, Step};
use instar_guest_sdk::memory::Change;
use instar_guest_sdk::Source;
use instar_guest_view::Layers;
use instar_testkit::{seen, Disk, SECTOR};
use std::collections::BTreeMap;

/// Draw the pair with this number, and do something else with it than to commit it: what, and what became of it.
#[must_use]
pub fn damaged_job(seed: u64, number: u64) -> (Job, Verdict) {
    let drawn = draw(seed, number);
    let job = Job::ALL[usize::try_from(number % 4).unwrap_or(0)];
    let mut verdict = judged(job, drawn.fixture, &drawn.files, seed ^ number, drawn.holes);
    if let Some(text) = &mut verdict.finding {
        *text = format!("pair {number}, {}: {text} [{}]", job.name(), drawn.story);
    }
    (job, verdict)
}

/// Draw the pair with this number, and look at everything that is done with it.
#[must_use]
pub fn damaged_pair(seed: u64, number: u64) -> Verdict {
    let drawn = draw(seed, number);
    let mut verdict = Verdict::not_admitted();
    let result = quietly(|| {
        look(&drawn);
        commit(&drawn)
    });
    match result {
        Ok(Ok(judged)) => verdict = judged,
        Ok(Err(text)) => verdict.finding = Some(text),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
            verdict.finding = Some(format!("a panic: {text}"));
        }
    }
    if let Some(text) = &mut verdict.finding {
        *text = format!("pair {number}: {text} [{}]", drawn.story);
    }
    verdict
}

/// Check overlay and backing, and map the chain. Panics on a finding.
fn look(drawn: &Drawn) {
    let facts =
        drawn.files.iter().map(|(device, bytes)| Some((*device, host::look(drawn.fixture.formats[device], bytes)?)));
    let Some(facts) = facts.collect::<Option<BTreeMap<u32, _>>>() else { return };
    let mut io = BoundedDevices::look(drawn.files.clone()).bounded();
    io.devices.holes = drawn.holes;
    for device in [OVERLAY, DEVICE_OUTPUT] {
        let config = config(device, &facts[&device], false, 0);
        let opened = open_source(drawn.fixture.formats[&device], &mut io, &config);
        let _ = opened.and_then(|mut source| source.check(&mut io, &mut |_, _| {}));
    }
    let mut open = |device: &u32| {
        let config = config(*device, &facts[device], false, 0);
        open_source(drawn.fixture.formats[device], &mut io, &config)
    };
    if let Ok(layers) = drawn.fixture.chain().iter().map(&mut open).collect::<Result<Vec<Box<dyn Source>>, _>>() {
        let _ = instar_guest_map::map(&mut Layers::new(layers), &mut io, &mut |_| {});
    }
    assert!(io.devices.log.is_empty(), "a check or a map changed something");
}

/// What the images read as: overlay and backing through all layers, and their snapshots.
struct Reading {
    overlay: Option<Disk>,
    backing: Option<Disk>,
    snapshots: Vec<Option<Disk>>,
}

fn reading(fixture: &Fixture, files: &Files) -> Reading {
    let chain = fixture.chain();
    let layers: Vec<Option<Disk>> =
        chain.iter().map(|device| fixture.formats[device].kit.salvage(&files[device])).collect();
    let view = |from: usize| {
        let layers: Option<Vec<&Disk>> = layers[from..].iter().map(Option::as_ref).collect();
        layers.and_then(|layers| seen(&layers))
    };
    let output = chain.iter().position(|&device| device == DEVICE_OUTPUT).unwrap_or(0);
    let snapshots = [OVERLAY, DEVICE_OUTPUT].into_iter();
    let snapshots =
        snapshots.flat_map(|device| fixture.formats[&device].kit.salvage_snapshots(&files[&device])).collect();
    Reading { overlay: view(0), backing: view(output), snapshots }
}

/// Commit the pair. An error is a finding; so is a panic.
fn commit(drawn: &Drawn) -> Result<Verdict, String> {
    let (fixture, files) = (drawn.fixture, &drawn.files);
    let Some(configs) = admitted(fixture, files) else { return Ok(Verdict::not_admitted()) };
    let before = reading(fixture, files);
    let mut io = hold(fixture, files.clone(), &configs).bounded();
    io.devices.holes = drawn.holes;
    let result = guest(fixture, &mut io, &configs);
    let ending = judge_ending(&io, files, &result)?;
    let compared = compare(&before, &reading(fixture, &io.devices.files), &result)?;
    let failure = result.err().map(|failure| format!("{}: {}", failure.step.name(), failure.error));
    Ok(Verdict { ending, compared, failure, finding: None, requests: io.devices.executed() })
}

fn judge_ending(
    io: &BoundedDevices,
    before: &Files,
    result: &Result<Outcome, CommitFailure>,
) -> Result<Ending, String> {
    let changed = |change: &Change| !matches!(change, Change::Flush { .. });
    let Err(failure) = result else {
        let unflushed = io.devices.unflushed();
        return if unflushed.is_empty() { Ok(Ending::Done) } else { Err(format!("unflushed: {unflushed:?}")) };
    };
    if failure.error.code == ErrorCode::InternalOverflow {
        return Err(format!("a guard of the driver: {}", failure.error));
    }
    if !io.devices.log.iter().any(changed) && io.devices.files == *before {
        return Ok(Ending::Refused);
    }
    match failure.step {
        Step::Check | Step::Plan => Err(format!("a refusal changed something: {}", failure.error)),
        Step::Write | Step::Verify | Step::Empty => Ok(Ending::FailedLater),
    }
}

/// Whether the images read as they must; `false` if they cannot be compared.
fn compare(before: &Reading, now: &Reading, result: &Result<Outcome, CommitFailure>) -> Result<bool, String> {
    let how = || match result {
        Ok(_) => "after the commit".to_owned(),
        Err(failure) => format!("after a failure in the step {}: {}", failure.step.name(), failure.error),
    };
    for (number, (old, new)) in before.snapshots.iter().zip(&now.snapshots).enumerate() {
        let (Some(old), Some(new)) = (old, new) else { continue };
        if let Some(sector) = differs(old, new, 0..old.states.len()) {
            return Err(format!("snapshot {number} reads something else in sector {sector} {}", how()));
        }
    }
    let (Some(overlay), Some(backing)) = (&before.overlay, &before.backing) else { return Ok(false) };
    let (Some(overlay_now), Some(backing_now)) = (&now.overlay, &now.backing) else {
        return Err(format!("an image cannot be read any more {}", how()));
    };
    if let Some(sector) = differs(overlay, overlay_now, 0..overlay.states.len()) {
        return Err(format!("the overlay reads something else in sector {sector} {}", how()));
    }
    // The last sector of the overlay may be the backing's in part.
    let whole = overlay.length / SECTOR;
    if let Some(sector) = differs(backing, backing_now, whole + 1..backing.states.len()) {
        return Err(format!("the backing reads something else in sector {sector} {}", how()));
    }
    for sector in 0..whole {
        let (old, wanted, new) = (backing.sector(sector), overlay.sector(sector), backing_now.sector(sector));
        let arrived = wanted.is_none_or(|wanted| new.is_some_and(|new| new == wanted));
        let unchanged = old.is_none_or(|old| new.is_some_and(|new| new.starts_with(old)));
        if !arrived && (result.is_ok() || !unchanged) {
            return Err(format!(
                "the backing reads neither what it did nor what the overlay does in sector {sector} {}",
                how()
            ));
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operations::fixtures::Pairs;
    use crate::operations::views;

    /// Otherwise the campaign would compare nothing.
    #[test]
    fn the_reader_agrees_with_that_of_the_other_tests() {
        for pairs in Pairs::all() {
            for fixture in &pairs.fixtures {
                let (read, views) = (reading(fixture, &fixture.files), views(fixture, &fixture.files));
                for (disk, device) in [(read.overlay, OVERLAY), (read.backing, DEVICE_OUTPUT)] {
                    let disk = disk.expect("a valid image can be read");
                    let unknown = (0..disk.states.len()).find(|&sector| disk.sector(sector).is_none());
                    assert!(unknown.is_none(), "{pairs:?} {:?} {device}: sector {unknown:?}", fixture.formats);
                    assert!(disk.bytes[..disk.length] == views[&device][..disk.length], "{pairs:?} {device}");
                }
            }
        }
    }
}
