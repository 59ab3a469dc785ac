//! Drawn chains: two to nine images of any formats, each of any kind, and a commit of what lies above any of them into that one.
//!
//! What is asked is what the fuzz targets ask of valid pairs ([`run`](super::commit)). Besides, the commit is interrupted at any
//! request: the overlay reads the same, both images are consistent, a backing of before does not go with the overlay if that
//! holds less by now, and a second commit does what the first would have.

use super::commit::{admitted, guest, hold, run};
use super::crashes::{again, read, restored, verify};
use super::{quietly, sound, views, Fixture, ANCESTOR, MIDDLE, OVERLAY};
use crate::formats::{Format, FORMATS};
use instar_guest_abi::DEVICE_OUTPUT;
use instar_guest_sdk::random::Random;
use instar_testkit::Place;

/// Images above the lowest one, at most.
const DEEPEST: usize = 8;
/// Sizes of disks in bytes: within a block of any format, and over several blocks of a MiB.
const SIZES: [usize; 4] = [64 << 10, 256 << 10, (1 << 20) - 4096, (3 << 20) - 4096];

/// A drawn chain, and what became of it.
#[derive(Debug)]
pub struct DrawnChain {
    /// The formats from the overlay down.
    pub formats: Vec<&'static str>,
    /// The place in `formats` of the image that is committed into.
    pub target: usize,
    /// Whether the host halves admit it: some images have to be the overlay itself.
    pub admitted: bool,
    /// What must not be.
    pub finding: Option<String>,
}

/// Draw the chain with this number, and commit it: from end to end, and interrupted.
#[must_use]
pub fn drawn_chain(seed: u64, number: u64) -> DrawnChain {
    let mut random =
        Random::seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xd134_2543_de82_ef95));
    let (fixture, target) = draw(&mut random);
    let formats = fixture.chain().iter().map(|device| fixture.formats[device].label).collect();
    let mut chain = DrawnChain { formats, target, admitted: false, finding: None };
    match quietly(|| whole(&fixture, &mut random)) {
        Ok(admitted) => chain.admitted = admitted,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
            chain.finding = Some(format!("chain {number}: {text} [{:?} into number {target}]", chain.formats));
        }
    }
    chain
}

/// The images, and which of them is committed into, counted from the overlay.
fn draw(random: &mut Random) -> (Fixture, usize) {
    let depth = 1 + random.index(DEEPEST);
    let place = Place {
        size: *random.pick(&SIZES),
        sector: *random.pick(&[512, 512, 512, 4096]),
        number: 1,
        has_parent: false,
    };
    let over_any: Vec<&'static Format> = FORMATS.iter().filter(|format| format.kit.goes_over_any()).collect();
    let mut images: Vec<(&'static Format, Vec<u8>)> = Vec::new();
    while images.len() <= depth {
        // A layer goes over one of the same plugin, or records nothing of its parent.
        let format = match images.last() {
            None => &FORMATS[random.index(FORMATS.len())],
            Some((below, _)) if random.index(6) > 0 => {
                let kinds = FORMATS.iter().filter(|format| format.name == below.name);
                *random.pick(&kinds.collect::<Vec<&'static Format>>())
            }
            Some(_) => *random.pick(&over_any),
        };
        let number = u8::try_from(images.len() + 1).expect("there are few");
        let place = Place { number, has_parent: !images.is_empty(), ..place };
        images.extend(format.kit.drawn(random, place).map(|bytes| (format, bytes)));
    }
    images.reverse();
    let sinks: Vec<usize> = (1..=depth).filter(|&index| images[index].0.kit.has_sink()).collect();
    if sinks.is_empty() {
        return draw(random);
    }
    let target = *random.pick(&sinks);
    let device = |index: usize| match index {
        0 => OVERLAY,
        _ if index == target => DEVICE_OUTPUT,
        _ if index + 1 == target => MIDDLE,
        _ if index == target + 1 => ANCESTOR,
        _ => u32::try_from(16 + index).expect("there are few"),
    };
    (
        Fixture::new(images.into_iter().enumerate().map(|(index, (format, bytes))| (device(index), format, bytes))),
        target,
    )
}

/// Whether the commit is admitted. Panics on a finding.
fn whole(fixture: &Fixture, random: &mut Random) -> bool {
    for (device, bytes) in &fixture.files {
        assert!(sound(fixture.formats[device], bytes), "the checker of the tests does not understand device {device}");
    }
    let Some(configs) = admitted(fixture, &fixture.files) else { return false };
    run(fixture, fixture.files.clone());
    let commit = |fail_at| {
        let mut io = hold(fixture, fixture.files.clone(), &configs);
        io.devices.fail_at = fail_at;
        let result = guest(fixture, &mut io, &configs);
        (io.devices, result)
    };
    let (done, result) = commit(None);
    if let Err(failure) = result {
        panic!("a chain of valid images is not committed: {}", failure.error);
    }
    let before = read(fixture, &fixture.files);
    let after = views(fixture, &done.files)[&DEVICE_OUTPUT].clone();
    let (stopped, _) = commit(Some(random.index(done.executed().max(1))));
    verify(fixture, &stopped.files, &before);
    restored(fixture, &stopped.files, &fixture.files, &before);
    again(fixture, stopped.files, &fixture.files, &before, Some(&after));
    true
}
