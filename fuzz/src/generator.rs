//! Makes inputs: seeds with bits flipped, numbers replaced by interesting ones, pieces moved, cut off and spliced.

use instar_guest_sdk::random::Random;

/// Numbers at which arithmetic and bounds break.
const INTERESTING: [u64; 14] = [
    0,
    1,
    511,
    512,
    65535,
    65536,
    1 << 31,
    u32::MAX as u64,
    1 << 55,
    1 << 56,
    1 << 62,
    1 << 63,
    i64::MAX as u64,
    u64::MAX,
];

/// A number, interesting or not.
pub fn value(random: &mut Random) -> u64 {
    match random.index(4) {
        0 => random.next_u64(),
        1 => random.next_u64() >> random.index(64),
        2 => (random.index(64) as u64) << random.index(22),
        _ => INTERESTING[random.index(INTERESTING.len())].wrapping_add(random.index(3) as u64).wrapping_sub(1),
    }
}

/// An input made from the seeds.
pub fn input(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = random.pick(seeds).clone();
    for _ in 0..=random.index(8) {
        mutate(&mut bytes, seeds, random);
    }
    bytes
}

fn mutate(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    if bytes.is_empty() {
        bytes.push(random.byte());
        return;
    }
    let at = random.index(bytes.len());
    match random.index(8) {
        0 => bytes[at] ^= 1 << random.index(8),
        1 => bytes[at] = random.byte(),
        // Fields are aligned, mostly.
        2..=4 => {
            let width = [2, 4, 8][random.index(3)];
            let at = at / width * width;
            let raw = value(random).to_be_bytes();
            for (place, byte) in bytes[at..].iter_mut().zip(&raw[8 - width..]) {
                *place = *byte;
            }
        }
        5 => bytes.truncate(at),
        6 => {
            let other = random.pick(seeds);
            let from = random.index(other.len().max(1));
            bytes.truncate(at);
            bytes.extend(other.get(from..).unwrap_or_default());
        }
        _ => {
            let length = random.index((bytes.len() - at).min(64)) + 1;
            let to = random.index(bytes.len() - length + 1);
            bytes.copy_within(at..at + length, to);
        }
    }
}
