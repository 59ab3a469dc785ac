//! Images to be built, and building them.

use crate::{put32, MAP};

/// Bytes of a block.
pub const BLOCK: usize = 1024;
/// Where the identity of an image begins whose number is 0: `uuidCreate` is this byte, `uuidModify` the next.
const UUID: u8 = 0x10;

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The bytes of [`fill`] for this seed.
    Data(u8),
    /// Zeroes, without a place in the file.
    Zero,
}

/// An image to be built.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Bytes of the disk, whole sectors.
    pub size: usize,
    /// Blocks that the image holds, by their number; slots in this order.
    pub blocks: Vec<(usize, State)>,
    /// Which image it is: number 1, 2, …
    pub number: u8,
    /// The number of the parent, 0 for none.
    pub parent: u8,
    /// `u32Type`, if it is not what the parent suggests.
    pub image_type: Option<u32>,
    /// Entries that the map has room for between header and data, at least as many as the disk has blocks.
    pub room: usize,
    /// Entries of the map that count, at least as many as the disk has blocks.
    pub entries: usize,
    /// Slots that nothing uses: those with these numbers.
    pub gaps: Vec<usize>,
    /// `cbBlockExtra`.
    pub extra: usize,
}

impl Spec {
    /// An empty image.
    pub fn new(size: usize, number: u8, parent: u8) -> Self {
        let blocks = size.div_ceil(BLOCK);
        Self {
            size,
            blocks: Vec::new(),
            number,
            parent,
            image_type: None,
            room: blocks,
            entries: blocks,
            gaps: Vec::new(),
            extra: 0,
        }
    }

    /// The same image with these blocks as well.
    pub fn with(mut self, blocks: impl IntoIterator<Item = (usize, State)>) -> Self {
        self.blocks.extend(blocks);
        self
    }

    /// A static image: all blocks are there, zero where nothing else was said.
    pub fn preallocated(mut self) -> Self {
        let missing =
            (0..self.size.div_ceil(BLOCK)).filter(|block| self.blocks.iter().all(|(other, _)| other != block));
        let missing: Vec<_> = missing.map(|block| (block, State::Data(0))).collect();
        self.blocks.extend(missing);
        self.image_type = Some(2);
        self
    }
}

/// `uuidCreate` and `uuidModify` of the image with this number, before anything was written to it.
pub fn identity(number: u8) -> [[u8; 16]; 2] {
    [[UUID.wrapping_add(number * 2); 16], [UUID.wrapping_add(number * 2 + 1); 16]]
}

/// The bytes of a block, different for each block and seed; zeroes for seed 0.
pub fn fill(block: usize, seed: u8) -> Vec<u8> {
    let byte = |at: usize| (at / 7) as u8 ^ seed ^ (block as u8).wrapping_mul(31) | 1;
    (0..BLOCK).map(|at| if seed == 0 { 0 } else { byte(at) }).collect()
}

/// Build the image.
pub fn build(spec: &Spec) -> Vec<u8> {
    let data = (MAP + spec.room.max(spec.entries) * 4).next_multiple_of(512);
    let mut file = vec![0; data];
    file[..10].copy_from_slice(b"a test VDI");
    let image_type = spec.image_type.unwrap_or(if spec.parent == 0 { 1 } else { 4 });
    let slots = spec.blocks.iter().filter(|(_, state)| *state != State::Zero).count() + spec.gaps.len();
    for (at, number) in [
        (64, 0xbeda_107f),
        (68, 0x0001_0001),
        (72, 400),
        (76, image_type as usize),
        (340, MAP),
        (344, data),
        (360, 512),
        (368, spec.size),
        (376, BLOCK),
        (380, spec.extra),
        (384, spec.entries),
        (388, slots),
        (468, 512),
    ] {
        put32(&mut file, at, number);
    }
    let [create, modify] = identity(spec.number);
    file[392..408].copy_from_slice(&create);
    file[408..424].copy_from_slice(&modify);
    if spec.parent != 0 {
        let [create, modify] = identity(spec.parent);
        file[424..440].copy_from_slice(&create);
        file[440..456].copy_from_slice(&modify);
    }
    file[MAP..MAP + spec.entries * 4].fill(0xff);
    let mut numbers = (0..slots).filter(|slot| !spec.gaps.contains(slot));
    let stride = BLOCK + spec.extra;
    file.resize(data + slots * stride, 0x77);
    for (block, state) in &spec.blocks {
        let entry = match state {
            State::Zero => 0xffff_fffe,
            State::Data(seed) => {
                let slot = numbers.next().unwrap();
                let at = data + slot * stride + spec.extra;
                file[at..at + BLOCK].copy_from_slice(&fill(*block, *seed));
                slot
            }
        };
        put32(&mut file, MAP + block * 4, entry);
    }
    file
}
