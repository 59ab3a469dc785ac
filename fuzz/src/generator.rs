//! Makes inputs: seeds with bits flipped, numbers replaced by interesting ones, pieces moved, cut off and spliced.

/// A small generator of random numbers, the same for the same seed everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator with this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// The next number (splitmix64).
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() % end as u64) as usize
    }
}

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
    match random.below(4) {
        0 => random.number(),
        1 => random.number() >> random.below(64),
        2 => (random.below(64) as u64) << random.below(22),
        _ => INTERESTING[random.below(INTERESTING.len())].wrapping_add(random.below(3) as u64).wrapping_sub(1),
    }
}

/// An input made from the seeds.
pub fn input(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(8) {
        mutate(&mut bytes, seeds, random);
    }
    bytes
}

fn mutate(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    if bytes.is_empty() {
        bytes.push(random.number() as u8);
        return;
    }
    let at = random.below(bytes.len());
    match random.below(8) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.number() as u8,
        // Fields are aligned, mostly.
        2..=4 => {
            let width = [2, 4, 8][random.below(3)];
            let at = at / width * width;
            let raw = value(random).to_be_bytes();
            for (place, byte) in bytes[at..].iter_mut().zip(&raw[8 - width..]) {
                *place = *byte;
            }
        }
        5 => bytes.truncate(at),
        6 => {
            let other = &seeds[random.below(seeds.len())];
            let from = random.below(other.len().max(1));
            bytes.truncate(at);
            bytes.extend(other.get(from..).unwrap_or_default());
        }
        _ => {
            let length = random.below((bytes.len() - at).min(64)) + 1;
            let to = random.below(bytes.len() - length + 1);
            bytes.copy_within(at..at + length, to);
        }
    }
}
