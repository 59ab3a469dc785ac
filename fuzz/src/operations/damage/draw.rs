//! Draws damaged pairs: valid images, and one to three words of metadata of either side.

use super::super::change::{one, CHANGE};
use super::super::commit::{admitted, called, hold};
use super::super::fixtures::Pairs;
use super::super::{Files, Fixture, ANCESTOR};
use instar_guest_abi::DEVICE_OUTPUT;
use instar_guest_sdk::random::Random;
use instar_testkit::Field;

/// A pair, and what was done to it.
pub struct Drawn {
    /// The images, as they were before.
    pub fixture: &'static Fixture,
    /// The images as they are.
    pub files: Files,
    /// Whether blocks of zeroes are holes.
    pub holes: bool,
    /// What was done, in words.
    pub story: String,
}

/// The pair with this number.
pub fn draw(seed: u64, number: u64) -> Drawn {
    let mut random =
        Random::seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.wrapping_mul(0xd134_2543_de82_ef95));
    let pairs = random.pick(Pairs::all());
    let fixture = pairs.choose(&[random.byte()]).expect("there are images");
    let mut drawn = Drawn { fixture, files: fixture.files.clone(), holes: random.coin(), story: format!("{pairs:?}") };
    if random.index(8) == 0 {
        restore(&mut drawn, &mut random);
    }
    for _ in 0..=random.index(3) {
        match random.index(8) {
            0 | 1 => contradict(&mut drawn, &mut random),
            2 => hollow(&mut drawn, &mut random),
            _ => word(&mut drawn, &mut random),
        }
    }
    if random.coin() {
        drawn.files.iter_mut().for_each(|(device, bytes)| fixture.formats[device].kit.seal(bytes));
        drawn.story += ", checksums made right";
    }
    drawn
}

/// One of the files that are to be damaged: those that are only read below the backing are not.
fn device(drawn: &Drawn, random: &mut Random) -> u32 {
    let devices: Vec<u32> = drawn.files.keys().copied().filter(|&device| device != ANCESTOR).collect();
    *random.pick(&devices)
}

/// A commit was interrupted, and the backing comes from a backup. The commit is a function, so that the pairs of a seed are the same
/// in every sandbox.
fn restore(drawn: &mut Drawn, random: &mut Random) {
    let fixture = drawn.fixture;
    let Some(configs) = admitted(fixture, &fixture.files) else { return };
    let run = |fail_at| {
        let mut io = hold(fixture, fixture.files.clone(), &configs);
        io.devices.fail_at = fail_at;
        // What it says does not matter.
        let _ = called(fixture, &mut io, &configs);
        io.devices
    };
    let all = run(None).executed();
    let at = random.index(all.max(1));
    let stopped = run(Some(at));
    drawn.files = stopped.files;
    drawn.files.insert(DEVICE_OUTPUT, fixture.files[&DEVICE_OUTPUT].clone());
    drawn.story += &format!(", stopped at request {at} of {all} and the backing restored");
}

/// One word becomes something else.
fn word(drawn: &mut Drawn, random: &mut Random) {
    let device = device(drawn, random);
    let mut change: Vec<u8> = (0..CHANGE).map(|_| random.byte()).collect();
    // The files keep their lengths.
    change[7] = 0;
    let layout = &drawn.fixture.layouts[&device];
    let Some(bytes) = drawn.files.get_mut(&device) else { return };
    let before = bytes.clone();
    one(bytes, layout, &change);
    let first = (0..before.len()).find(|&at| bytes.get(at) != before.get(at));
    drawn.story += &first.map_or(String::new(), |at| format!(", device {device} changed at {at:#x}"));
}

/// Two entries name the same: a table, a cluster, a grain.
fn contradict(drawn: &mut Drawn, random: &mut Random) {
    let device = device(drawn, random);
    let kinds = &drawn.fixture.layouts[&device].kinds;
    let Some(bytes) = drawn.files.get_mut(&device) else { return };
    let value = |bytes: &[u8], field: &Field| bytes.get(field.at..field.at + field.width).map(<[u8]>::to_vec);
    for _ in 0..16 {
        if kinds.is_empty() {
            return;
        }
        let kind = random.pick(kinds);
        let (from, to) = (*random.pick(kind), *random.pick(kind));
        let Some(entry) = value(bytes, &from).filter(|entry| entry.iter().any(|&byte| byte != 0)) else { continue };
        if value(bytes, &to).is_some_and(|old| old != entry) && from.width == to.width {
            bytes[to.at..to.at + to.width].copy_from_slice(&entry);
            drawn.story += &format!(", device {device}: the entry at {:#x} copied to {:#x}", from.at, to.at);
            return;
        }
    }
}

/// A structure becomes zeroes, as if a hole had been punched there.
fn hollow(drawn: &mut Drawn, random: &mut Random) {
    let device = device(drawn, random);
    let layout = &drawn.fixture.layouts[&device];
    if layout.places.is_empty() {
        return;
    }
    let at = random.pick(&layout.places).saturating_mul(layout.unit).saturating_add(layout.origin);
    let length = *random.pick(&[512, 2048, 4096, 65536]);
    let Some(bytes) = drawn.files.get_mut(&device) else { return };
    let start = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
    let end = start.saturating_add(length).min(bytes.len());
    bytes[start..end].fill(0);
    drawn.story += &format!(", device {device}: zeroes from {start:#x} to {end:#x}");
}
