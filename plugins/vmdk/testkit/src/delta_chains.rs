//! Valid delta disks, for those who commit and damage them. Each is one image: its descriptor, and the extent behind it.

use crate::delta::{cowd, sesparse, SeHeld, SE_GRAIN};
use crate::packed::pack;
use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::random::Random;
use instar_testkit::chain::units;
use instar_testkit::{Chain, Parts, Place, ANCESTOR, MIDDLE, OVERLAY};

/// No parent.
const NONE: u32 = u32::MAX;

/// The bytes of a grain, different for each grain and seed, and none of them zero.
fn fill(grain: usize, length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at / 7) as u8 ^ seed ^ (grain as u8).wrapping_mul(31) | 1).collect()
}

/// A disk of ESX: its content ID and its parent's, and the grains that it holds, with the seeds of their bytes.
fn esx(ids: (u32, u32), size: usize, grain: usize, grains: impl IntoIterator<Item = (usize, u8)>) -> Vec<u8> {
    let grains: Vec<_> = grains.into_iter().map(|(number, seed)| (number, fill(number, grain, seed))).collect();
    pack(("vmfsSparse", "VMFSSPARSE"), ids, size, &cowd(size, grain, &grains))
}

/// The same of seSparse; some seeds are those of zeroes.
fn space_efficient(ids: (u32, u32), size: usize, grains: impl IntoIterator<Item = (usize, u8)>) -> Vec<u8> {
    let held = |(number, seed): (usize, u8)| match seed % 8 {
        0 => (number, SeHeld::Zero),
        1 => (number, SeHeld::Unmapped),
        _ => (number, SeHeld::Data(fill(number, SE_GRAIN, seed))),
    };
    pack(("seSparse", "SESPARSE"), ids, size, &sesparse(size, &grains.into_iter().map(held).collect::<Vec<_>>()))
}

fn seeded(grains: &[usize], seed: u8) -> Vec<(usize, u8)> {
    grains.iter().map(|grain| (*grain, seed)).collect()
}

/// vmfsSparse into vmfsSparse: grains of one sector and of 4 KiB, and several layers at once.
pub fn cowd_chains() -> Vec<Chain> {
    // Two tables of grains of a sector.
    let size = (2 << 20) + 100 * 512;
    let mut chains = Vec::new();
    for (top, base, root) in [(512, 512, 512), (4096, 512, 512), (512, 4096, 512)] {
        let overlay = esx((7, 5), size, top, seeded(&[9, 0, 1, 5, 300, (size - 1) / top], 0x21));
        let backing = esx((5, 4), size, base, seeded(&[3, 0, 40, 41], 0x43));
        let root = esx((4, NONE), size, root, seeded(&[0, 1, 2, 3, 4, 5, 40, 301], 0x66));
        chains.push(vec![(OVERLAY, overlay), (DEVICE_OUTPUT, backing), (ANCESTOR, root)]);
    }
    let overlay = esx((7, 5), size, 512, seeded(&[1, 4095, 4096], 0x21));
    chains.push(vec![(OVERLAY, overlay), (DEVICE_OUTPUT, esx((5, NONE), size, 512, []))]);
    chains.push(vec![
        (OVERLAY, esx((7, 6), size, 512, seeded(&[1, 4096], 0x21))),
        (MIDDLE, esx((6, 5), size, 4096, seeded(&[0, 512], 0x31))),
        (DEVICE_OUTPUT, esx((5, 4), size, 512, seeded(&[2, 3], 0x43))),
        (ANCESTOR, esx((4, NONE), size, 512, seeded(&[0, 5], 0x66))),
    ]);
    chains
}

/// Overlays without a parent of their own, which go over any backing; backings; a layer between.
pub fn cowd_parts(size: usize) -> Parts {
    let backing = |grain| esx((5, NONE), size, grain, seeded(&[0, 2, 7], 0x43));
    Parts {
        overlays: vec![esx((7, NONE), size, 512, seeded(&[0, 1, 8, 40, (size - 1) / 512], 0x21))],
        middle: Some(esx((6, 5), size, 512, seeded(&[1, 5], 0x31))),
        backings: vec![backing(512), backing(4096), esx((5, NONE), size, 512, [])],
    }
}

/// Overlays that are only read.
pub fn sesparse_parts(size: usize) -> Parts {
    let middle = Some(space_efficient((6, 5), size, [(0, 2), (3, 8), (4, 5)]));
    let overlays = vec![space_efficient((7, NONE), size, [(0, 2), (1, 8), (2, 9), (15, 3)])];
    Parts { overlays, middle, backings: Vec::new() }
}

fn ids(place: &Place) -> (u32, u32) {
    (place.number.into(), if place.has_parent { u32::from(place.number - 1) } else { NONE })
}

/// A disk of ESX with grains of 512 bytes to 8 KiB.
pub fn cowd_drawn(random: &mut Random, place: Place) -> Vec<u8> {
    let grain = 512 << random.index(5);
    let grains = units(random, place.size / grain);
    esx(ids(&place), place.size, grain, grains)
}

/// A seSparse disk.
pub fn sesparse_drawn(random: &mut Random, place: Place) -> Vec<u8> {
    let grains = units(random, place.size / SE_GRAIN);
    space_efficient(ids(&place), place.size, grains)
}
