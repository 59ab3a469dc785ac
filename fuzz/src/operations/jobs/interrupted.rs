//! Operations besides commits that lose power: every state of them, and the run that follows.
//!
//! What is asked of each state: whatever was read through the images reads the same, through the parent that the overlay names
//! by then, in the old size or the new one; other images and snapshots are untouched; what does not carry the dirty bit has no
//! corruption; and a second run is done, and passes all that is asked of a first one. Some of these runs lose power, too.

use super::{convert, is_kept, Ended, Job, Trial};
use crate::formats::FORMATS;
use crate::host;
use crate::operations::crashes::examine;
use crate::operations::{Files, Fixture, OVERLAY};
use instar_guest_sdk::crash::Crashes;
use instar_guest_sdk::memory::Change;
use instar_guest_sdk::random::Random;

/// What a rerun is told besides what was told before.
struct Run<'a> {
    job: Job,
    fixture: &'a Fixture,
    number: u64,
    /// The size in bytes that an image gets.
    size: Option<u64>,
    /// The images before the first run, and what is converted into.
    before: &'a Files,
}

/// Do this with the images, and look at every state that a power loss can leave: how many there were. `None` if there is nothing
/// to look at: the images are not admitted, it is refused, or nothing was changed.
///
/// # Panics
/// If a state is not what it must be.
pub fn interrupted_job(job: Job, fixture: &Fixture, files: &Files, number: u64, crashes: Crashes) -> Option<usize> {
    let mut before = files.clone();
    let mut size = None;
    match job {
        Job::Resize => size = new_size(fixture, files, number),
        Job::Convert => {
            before.insert(convert::TARGET, old_target(fixture, files, number)?);
        }
        Job::Rebase | Job::Repair => {}
    }
    let run = Run { job, fixture, number, size, before: &before };
    let (log, now) = run.done(&before).ok().filter(|(log, _)| !log.is_empty())?;
    Some(crashes.each_again(&before, &log, &mut |state| {
        let switched = run.instant(&state, &now);
        if switched {
            // It is done: the old parent is none of the images any more.
            return Vec::new();
        }
        let (log, again) = match run.done(&state) {
            Ok(done) => done,
            // A size that a format takes only once, as it has to be that of what is below: it has it by now.
            Err(why) => {
                let has_size = job == Job::Resize && run.size_of(&state) == run.size_of(&now);
                assert!(has_size && run.done(&now).is_err(), "{job:?}: a second run is refused: {why}");
                return Vec::new();
            }
        };
        if job == Job::Convert {
            let view = |files: &Files| run.target().kit.salvage(&files[&convert::TARGET]);
            assert!(view(&again) == view(&now), "a second conversion makes something else");
        }
        log
    }))
}

/// Another size than the image that is resized has, in bytes.
fn new_size(fixture: &Fixture, files: &Files, number: u64) -> Option<u64> {
    let mut random = Random::seeded(number);
    // The image that `resize::run` draws.
    let device = fixture.chain()[random.index(fixture.chain().len())];
    let old = host::look(fixture.formats[&device], &files[&device])?.virtual_size / 512;
    let new = *random.pick(&[old / 2, old.saturating_sub(3), old + 1, old + 40, old * 2, old * 5]);
    Some(new.max(1) * 512)
}

/// An image of the format that `convert::run` draws, which holds what the lowest image of the chain does.
fn old_target(fixture: &Fixture, files: &Files, number: u64) -> Option<Vec<u8>> {
    let format = &FORMATS[Random::seeded(number).index(FORMATS.len())];
    let chain = fixture.chain();
    let size = host::look(fixture.formats[&chain[0]], &files[&chain[0]])?.virtual_size;
    let facts = host::look(fixture.formats[chain.last()?], &files[chain.last()?])?;
    if format.packed || !format.kit.has_sink() || facts.virtual_size != size {
        return None;
    }
    let device = *chain.last()?;
    let base = Fixture::new([(device, fixture.formats[&device], files[&device].clone())]);
    let of_base = base.files.clone();
    let mut trial = Trial::of(&base, &of_base, number)?;
    trial.target = Some(convert::created(format, size)?);
    let io = trial.devices(of_base.clone());
    let ended = trial.run(Job::Convert, io).unwrap_or_else(|finding| panic!("{finding}"))?;
    ended.result.ok()?;
    ended.io.devices.files.get(&convert::TARGET).cloned()
}

impl Run<'_> {
    /// The virtual size in bytes of the image that is resized.
    fn size_of(&self, files: &Files) -> Option<u64> {
        let chain = self.fixture.chain();
        let device = chain[Random::seeded(self.number).index(chain.len())];
        host::look(self.fixture.formats[&device], &files[&device]).map(|facts| facts.virtual_size)
    }

    /// The format that is converted into.
    fn target(&self) -> &'static crate::formats::Format {
        &FORMATS[Random::seeded(self.number).index(FORMATS.len())]
    }

    /// The images that are no target.
    fn images(files: &Files) -> Files {
        files.iter().filter(|(device, _)| **device != convert::TARGET).map(|(d, bytes)| (*d, bytes.clone())).collect()
    }

    /// Run it: what it changed, and the images afterwards; else why it is refused.
    fn done(&self, files: &Files) -> Result<(Vec<Change>, Files), String> {
        let images = Self::images(files);
        let mut trial = Trial::of(self.fixture, &images, self.number).ok_or("a plugin does not know its image")?;
        trial.size = self.size;
        trial.target = files.get(&convert::TARGET).cloned();
        let io = trial.devices(images.clone());
        let ended = trial.run(self.job, io).unwrap_or_else(|finding| panic!("{:?}: {finding}", self.job));
        let Ended { io, result, .. } = ended.ok_or("it is not admitted")?;
        if let Err((planning, error)) = result {
            assert!(planning, "{:?} fails: {error}", self.job);
            return Err(error.to_string());
        }
        assert!(io.devices.unflushed().is_empty(), "at the end, something is not flushed");
        Ok((io.devices.log, io.devices.files))
    }

    /// What holds at every instant. Whether the overlay has another parent by now.
    fn instant(&self, state: &Files, after: &Files) -> bool {
        let chain = self.fixture.chain();
        let images = Self::images(self.before);
        let trial = Trial::of(self.fixture, &images, self.number).expect("it was looked at before");
        let mut random = Random::seeded(self.number);
        let mut changed = OVERLAY;
        let mut switched = false;
        match self.job {
            Job::Convert => {
                assert!(Self::images(state) == images, "an image that is only read has changed");
                let format = self.target();
                let corruptions = examine(convert::TARGET, format, &state[&convert::TARGET]);
                let excused = !format.kit.has_metadata() || format.kit.is_dirty(&state[&convert::TARGET]);
                assert!(excused || corruptions.is_empty(), "the target: {corruptions:?}");
                return false;
            }
            Job::Rebase => {
                let new = &chain[1 + random.index(chain.len())..];
                let backing = |files: &Files| {
                    let facts = host::look(self.fixture.formats[&OVERLAY], &files[&OVERLAY]).expect("a valid image");
                    (facts.backing, facts.parent_identity)
                };
                let now = backing(state);
                switched = now != backing(self.before);
                assert!(!switched || now == backing(after), "it names neither of both parents");
                let through = if switched { new } else { &chain[1..] };
                let through = [&[OVERLAY], through].concat();
                if let Some(view) = trial.view(&images, chain) {
                    let now = trial.view(state, &through).expect("the overlay cannot be read any more");
                    is_kept(&view, &now, view.states.len(), "the overlay")
                        .unwrap_or_else(|finding| panic!("{finding}"));
                }
                let is_gone = now.0.is_none();
                assert!(!switched || is_gone == new.is_empty(), "another parent than was asked for");
            }
            Job::Resize | Job::Repair => {
                let index = random.index(chain.len());
                changed = chain[index];
                let through = &chain[index..];
                if let Some(view) = trial.view(&images, through) {
                    let now = trial.view(state, through).expect("the image cannot be read any more");
                    let done = trial.view(after, through).expect("the image cannot be read afterwards");
                    let lengths = [view.length, done.length];
                    assert!(lengths.contains(&now.length), "{} bytes, and neither of {lengths:?}", now.length);
                    let whole = view.states.len().min(now.states.len());
                    is_kept(&view, &now, whole, "the image").unwrap_or_else(|finding| panic!("{finding}"));
                }
            }
        }
        for (device, bytes) in state {
            assert!(*device == changed || *bytes == images[device], "device {device} has changed");
        }
        let format = self.fixture.formats[&changed];
        trial.snapshots_are_kept(changed, &state[&changed]).unwrap_or_else(|finding| panic!("{finding}"));
        if format.kit.has_metadata() && !format.kit.is_dirty(&state[&changed]) {
            let (was, is) = (examine(changed, format, &images[&changed]), examine(changed, format, &state[&changed]));
            assert!(is.is_empty() || !was.is_empty(), "device {changed}: {is:?}");
        }
        switched
    }
}
