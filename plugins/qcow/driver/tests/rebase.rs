//! An image that gets another backing file: at every instant of a power loss it reads what it read, through whichever of the
//! two it names then, and running it again finishes it.
#![allow(missing_docs, clippy::cast_possible_truncation)]

use instar_guest_sdk::abi::DEVICE_OUTPUT;
use instar_guest_sdk::crash::{Crashes, Files};
use instar_guest_sdk::random::Random;
use instar_qcow_testkit::{build, Kit, Spec, State, CLUSTER};
use instar_testkit::rebase::{Below, Rebased, Seen};

const OLD: u32 = 3;
const NEW: u32 = 4;
const NONE: Below<'_> = (b"", &[]);
const CRASHES: Crashes = Crashes { drawn: 6, seed: 3 };
/// It goes behind everything else.
const LONG: &[u8] = &[b'n'; 700];

fn rebased(overlay: &Spec, layers: &[(u32, Spec)], old: Below<'_>, new: Below<'_>, crashes: Crashes) -> Seen {
    let own = Spec { name: old.0.to_vec(), ..overlay.clone() };
    let mut files = Files::from([(DEVICE_OUTPUT, build(&own))]);
    files.extend(layers.iter().map(|(device, spec)| (*device, build(spec))));
    let (seen, _) = Rebased { kit: &Kit, format: "qcow", files, old, new }.verify(crashes);
    println!("{seen:?}");
    seen
}

/// A disk of so many clusters that holds data in these.
fn image(clusters: usize, cut: usize, seed: u8, held: &[usize]) -> Spec {
    let held = held.iter().filter(|cluster| **cluster < clusters);
    let state = |cluster: usize| if cluster % 3 == 1 { State::Packed(seed) } else { State::Data(seed) };
    Spec::new(clusters * CLUSTER - cut, b"").with(held.map(|cluster| (*cluster, state(*cluster))))
}

#[test]
fn every_crash_point_over_longer_shorter_and_no_ones() {
    for lengths in [[12, 12], [9, 80], [80, 9], [80, 80]] {
        for (clusters, tail) in [(11, 0), (75, 0), (75, 3 * CLUSTER + 77)] {
            let own = Spec { tail, ..image(clusters, 512, 0x21, &[0, 4, 7]) };
            let mut new = image(lengths[1], 0, 0x43, &[0, 3, 5, 7, 9, 71, 72]);
            new.clusters.push((8, State::Data(0x55)));
            new.clusters.push((2, State::Data(0)));
            let layers = [(OLD, image(lengths[0], 0, 0x43, &[0, 1, 3, 6, 8, 70, 71])), (NEW, new)];
            let (old, new) = ((&b"old"[..], &[OLD][..]), (&b"new"[..], &[NEW][..]));
            for (old, new) in [(old, new), (old, (LONG, &[NEW])), (old, NONE), (NONE, new), (NONE, (LONG, &[NEW]))] {
                let seen = rebased(&own, &layers, old, new, CRASHES);
                assert!(seen.bytes > 0 && seen.states > 2 && seen.between > 0, "{seen:?}");
            }
        }
    }
}

#[test]
fn a_layer_is_dropped() {
    let layers = [(OLD, image(12, 0, 0x43, &[0, 1, 3, 6])), (NEW, image(80, 0, 0x55, &[1, 2, 6, 8, 70]))];
    let own = image(75, 512, 0x21, &[0, 4, 64]);
    let seen = rebased(&own, &layers, (b"old", &[OLD, NEW]), (b"new", &[NEW]), CRASHES);
    assert!(seen.bytes > 0 && seen.between > 3, "{seen:?}");
}

#[test]
fn drawn_images() {
    let mut states = 0;
    for number in 0..24 {
        let random = &mut Random::seeded(number);
        let mut drawn = || {
            let size = random.below(90) as usize + 2;
            let held: Vec<usize> = (0..size).filter(|_| random.below(3) == 0).collect();
            Spec { tail: random.below(2) as usize * 333, ..image(size, random.below(2) as usize * 512, 0x43, &held) }
        };
        let (own, old, new) = (drawn(), drawn(), drawn());
        let crashes = Crashes { drawn: 4, seed: number };
        let name = if number % 2 == 0 { &b"new"[..] } else { LONG };
        states += rebased(&own, &[(OLD, old), (NEW, new)], (b"old", &[OLD]), (name, &[NEW]), crashes).states;
    }
    assert!(states > 300, "{states}");
}
