//! What is done with images besides commits: they get another size, another parent, a copy in another format, or a repair.
//!
//! What is asked: nothing panics or takes work out of proportion, and no request breaks a rule of the host. What is refused
//! before its first change has changed nothing. Of what the testkits' reader of damaged images can read before, everything reads
//! as it must afterwards, whatever happens; so do all snapshots.

mod convert;
mod interrupted;
mod rebase;
mod repair;
mod resize;

use super::bounded_devices::BoundedDevices;
use super::change::apply;
use super::fixtures::Pairs;
use super::verdict::{differs, Ending, Verdict};
use super::{config, open_source, quietly, Files, Fixture};
use crate::host;
use instar_guest_abi::{DeviceConfig, ErrorCode};
use instar_guest_sdk::memory::Change;
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{DriverError, DriverResult, Source};
use instar_plugin_api::{Context, ImageFacts, Role};
use instar_testkit::{seen, Disk};
use std::collections::BTreeMap;

pub use interrupted::interrupted_job;

/// No file may become longer than this in bytes, whatever the verdict allows: the disk is full.
const DISK: u64 = 48 << 20;

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Job {
    /// One image of a chain gets another size.
    Resize,
    /// The overlay gets another parent.
    Rebase,
    /// The chain becomes a new image.
    Convert,
    /// One image is repaired.
    Repair,
}

impl Job {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Resize, Self::Rebase, Self::Convert, Self::Repair];

    /// What its fuzz target is called.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Resize => "resize",
            Self::Rebase => "rebase",
            Self::Convert => "convert",
            Self::Repair => "repair",
        }
    }
}

/// Why an operation ended: whether nothing may have changed by then, and the reason.
type Failure = (bool, DriverError);

/// An operation that was admitted, and what became of it.
struct Ended {
    io: BoundedDevices,
    result: Result<(), Failure>,
    /// Whether what was read before could be compared with what is read now.
    compared: bool,
}

/// What an operation comes to: `None` if the host halves do not admit it, and a finding.
type Outcome = Result<Option<Ended>, String>;

/// The images of an operation.
struct Trial<'a> {
    fixture: &'a Fixture,
    files: &'a Files,
    facts: BTreeMap<u32, ImageFacts>,
    random: Random,
    holes: bool,
    /// The size in bytes that an image gets, if it is not drawn.
    size: Option<u64>,
    /// An image that is converted into, as `convert -n` does, and not a new one.
    target: Option<Vec<u8>>,
}

/// A fuzz target: change the images that an input names, of those of all targets, and do this with them.
pub fn run_job(job: Job, input: &[u8]) {
    let Some(&first) = input.first() else { return };
    let fixtures = || Pairs::all().iter().flat_map(|pairs| &pairs.fixtures);
    let Some(fixture) = fixtures().nth(usize::from(first) % fixtures().count()) else { return };
    let byte = |at: usize| input.get(at).copied().unwrap_or(0);
    // Bits of the changes that say nothing of these.
    let number = u64::from(byte(1) >> 3) | u64::from(byte(7)) << 5 | u64::from(byte(16)) << 13;
    let verdict = tried(job, fixture, &apply(fixture, input), number, number % 2 == 0, false);
    assert!(verdict.finding.is_none(), "{:?}", verdict.finding);
}

/// Do it with these images, in the way that the number says. A panic is a finding.
pub(super) fn judged(job: Job, fixture: &Fixture, files: &Files, number: u64, holes: bool) -> Verdict {
    match quietly(|| tried(job, fixture, files, number, holes, true)) {
        Ok(verdict) => verdict,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
            Verdict { finding: Some(format!("a panic: {text}")), ..Verdict::not_admitted() }
        }
    }
}

fn tried(job: Job, fixture: &Fixture, files: &Files, number: u64, holes: bool, bounded: bool) -> Verdict {
    let Some(trial) = Trial::of(fixture, files, number) else { return Verdict::not_admitted() };
    let mut trial = Trial { holes, ..trial };
    let io = trial.devices(files.clone());
    let io = if bounded { io.bounded() } else { io };
    let ended = match trial.run(job, io) {
        Ok(Some(ended)) => ended,
        Ok(None) => return Verdict::not_admitted(),
        Err(finding) => return Verdict { finding: Some(finding), ..Verdict::not_admitted() },
    };
    let failure = ended.result.as_ref().err().map(|(_, error)| error.to_string());
    let requests = ended.io.devices.executed();
    match ending(&ended, files) {
        Ok(ending) => Verdict { ending, compared: ended.compared, failure, finding: None, requests },
        Err(finding) => Verdict { finding: Some(finding), ..Verdict::not_admitted() },
    }
}

fn ending(Ended { io, result, .. }: &Ended, before: &Files) -> Result<Ending, String> {
    let Err((planning, error)) = result else {
        let unflushed = io.devices.unflushed();
        return if unflushed.is_empty() { Ok(Ending::Done) } else { Err(format!("unflushed: {unflushed:?}")) };
    };
    if error.code == ErrorCode::InternalOverflow {
        return Err(format!("a guard of the driver: {error}"));
    }
    let changed = |change: &Change| !matches!(change, Change::Flush { .. });
    let same = before.iter().all(|(device, bytes)| io.devices.files.get(device) == Some(bytes));
    if !io.devices.log.iter().any(changed) && same {
        return Ok(Ending::Refused);
    }
    if *planning {
        return Err(format!("a refusal changed something: {error}"));
    }
    Ok(Ending::FailedLater)
}

impl<'a> Trial<'a> {
    /// `None` if a plugin does not know its image.
    fn of(fixture: &'a Fixture, files: &'a Files, number: u64) -> Option<Self> {
        let look = |(device, bytes): (&u32, &Vec<u8>)| Some((*device, host::look(fixture.formats[device], bytes)?));
        let facts = files.iter().map(look).collect::<Option<BTreeMap<u32, ImageFacts>>>()?;
        Some(Self { fixture, files, facts, random: Random::seeded(number), holes: false, size: None, target: None })
    }

    fn run(&mut self, job: Job, io: BoundedDevices) -> Outcome {
        match job {
            Job::Resize => resize::run(self, io),
            Job::Rebase => rebase::run(self, io),
            Job::Convert => convert::run(self, io),
            Job::Repair => repair::run(self, io),
        }
    }
}

impl Trial<'_> {
    fn devices(&self, files: Files) -> BoundedDevices {
        let mut io = BoundedDevices::look(files);
        io.devices.holes = self.holes;
        io
    }

    /// What the host tells of a device, which may become so long.
    fn config(&self, device: u32, writable: bool, longest: u64) -> DeviceConfig {
        let facts = &self.facts[&device];
        let longest = longest.max(facts.file_length).min(DISK.max(facts.file_length));
        config(device, facts, writable, longest)
    }

    /// Whether the host halves let these images be read, each through the next one.
    fn admits(&self, chain: &[u32]) -> bool {
        chain.iter().enumerate().all(|(index, device)| {
            let parent = chain.get(index + 1);
            let below = parent.map(|parent| &self.facts[parent]);
            let goes = parent.is_none_or(|parent| {
                let next = (self.fixture.formats[parent].next_identity)(&self.facts[parent], &self.facts[device]);
                self.facts[device].goes_with(&self.facts[parent], &next)
            });
            goes && self.ask(*device, Role::Below, &Context::reading(below, false)).is_some()
        })
    }

    /// How long a file may become, if the plugin lets the image take this part.
    fn ask(&self, device: u32, role: Role, context: &Context<'_>) -> Option<u64> {
        let verdict = host::verdict(self.fixture.formats[&device], role, &self.facts[&device], context);
        (verdict.code == 0).then_some(verdict.max_length)
    }

    fn open(&self, io: &mut BoundedDevices, device: u32) -> DriverResult<Box<dyn Source>> {
        open_source(self.fixture.formats[&device], io, &self.config(device, false, 0))
    }

    fn open_all(&self, io: &mut BoundedDevices, devices: &[u32]) -> DriverResult<Vec<Box<dyn Source>>> {
        devices.iter().map(|device| self.open(io, *device)).collect()
    }

    /// What these layers read as, as far as damage lets that be read.
    fn view(&self, files: &Files, chain: &[u32]) -> Option<Disk> {
        let salvaged = |device: &u32| self.fixture.formats[device].kit.salvage(&files[device]);
        let layers: Vec<Disk> = chain.iter().map(salvaged).collect::<Option<_>>()?;
        seen(&layers.iter().collect::<Vec<&Disk>>())
    }

    /// An error if a snapshot of an image reads something else than it did.
    fn snapshots_are_kept(&self, device: u32, now: &[u8]) -> Result<(), String> {
        let kit = self.fixture.formats[&device].kit;
        let (old, new) = (kit.salvage_snapshots(&self.files[&device]), kit.salvage_snapshots(now));
        for (number, (old, new)) in old.iter().zip(&new).enumerate() {
            let (Some(old), Some(new)) = (old, new) else { continue };
            let shared = old.states.len().min(new.states.len());
            if let Some(sector) = differs(old, new, 0..shared) {
                return Err(format!("snapshot {number} of device {device} reads something else in sector {sector}"));
            }
        }
        Ok(())
    }
}

/// An error if what could be read of these sectors reads something else now.
fn is_kept(before: &Disk, now: &Disk, sectors: usize, what: &str) -> Result<(), String> {
    match differs(before, now, 0..sectors) {
        Some(sector) => Err(format!("{what} reads something else in sector {sector}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise the targets would try nothing but refusals.
    #[test]
    fn images_without_a_change_are_worked_on() {
        for job in Job::ALL {
            let fixtures = Pairs::all().iter().flat_map(|pairs| &pairs.fixtures);
            let verdicts = fixtures
                .step_by(3)
                .flat_map(|fixture| (0..2).map(move |number| judged(job, fixture, &fixture.files, number, false)));
            let verdicts: Vec<Verdict> = verdicts.collect();
            let findings: Vec<&String> = verdicts.iter().filter_map(|verdict| verdict.finding.as_ref()).collect();
            assert!(findings.is_empty(), "{job:?}: {findings:#?}");
            let done = verdicts.iter().filter(|verdict| verdict.ending == Ending::Done && verdict.compared).count();
            assert!(done * 5 > verdicts.len(), "{job:?}: {done} of {}", verdicts.len());
        }
    }
}
