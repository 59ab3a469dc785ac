//! Builds qcow2 images byte by byte from the specification.

use super::bitmaps::{BitmapSpec, Bits};
use instar_guest_sdk::random::Random;
use std::collections::BTreeMap;

/// What a guest cluster holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Plain data; every byte of the cluster is derived from the seed.
    Data(u8),
    /// The zero flag alone.
    Zero,
    /// The zero flag with a host cluster full of stale bytes.
    ZeroAllocated(u8),
    /// A compressed cluster (of nonsense).
    Compressed,
    /// A compressed cluster (deflate) with the bytes of [`mixed`]. They follow each other without a gap in the
    /// file, as long as nothing else is allocated between them.
    Deflated(u8),
    /// With extended entries: a host cluster of [`pattern`], and the masks of allocated and of zero subclusters.
    Mixed(u8, u32, u32),
    /// With extended entries: no host cluster, and the mask of zero subclusters.
    MixedZero(u32),
}

/// An image to be built.
#[derive(Clone, Debug)]
pub struct Spec {
    /// 2 or 3.
    pub version: u32,
    /// Binary logarithm of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// By the number of the guest cluster; those that are missing read from below.
    pub clusters: BTreeMap<u64, State>,
    /// Clusters of the refcount table.
    pub table_clusters: u64,
    /// Leaked clusters (refcount 1, no reference) before the data.
    pub leaks: u64,
    /// Free clusters full of stale bytes after the leaks, every other one of twice as many.
    pub free: u64,
    /// `autoclear_features` of the header.
    pub autoclear: u64,
    /// Binary logarithm of the bits of a refcount, 0 to 6.
    pub refcount_order: u32,
    /// Refcount blocks stand before everything that they describe, not after it.
    pub blocks_first: bool,
    /// Snapshots of the state as it is: they share all L2 tables and data clusters with it.
    pub snapshots: usize,
    /// Persistent bitmaps, in the order of their directory.
    pub bitmaps: Vec<BitmapSpec>,
    /// The file ends with the last byte that is not zero.
    pub cut: bool,
    /// L2 entries of 16 bytes.
    pub extended: bool,
    /// Clusters stand in a data file: see [`build_outside`].
    pub outside: bool,
}

impl Spec {
    /// An empty image of version 3 with refcounts of 16 bits.
    pub fn new(cluster_bits: u32, virtual_size: u64) -> Self {
        Self {
            version: 3,
            cluster_bits,
            virtual_size,
            clusters: BTreeMap::new(),
            table_clusters: 1,
            leaks: 0,
            free: 0,
            autoclear: 0,
            refcount_order: 4,
            blocks_first: false,
            snapshots: 0,
            bitmaps: Vec::new(),
            cut: false,
            extended: false,
            outside: false,
        }
    }

    /// The same image with these guest clusters as well.
    pub fn with(mut self, clusters: impl IntoIterator<Item = (u64, State)>) -> Self {
        self.clusters.extend(clusters);
        self
    }

    /// The same image in another version.
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }
}

/// The content of a data cluster: different for every seed and position.
pub fn pattern(seed: u8, guest_cluster: u64, size: usize) -> Vec<u8> {
    (0..size).map(|i| seed ^ (guest_cluster as u8).wrapping_mul(31) ^ (i / 64) as u8 | 1).collect()
}

/// The content of a compressed cluster: an eighth of noise for each 32 that the seed is large, then a pattern.
pub fn mixed(seed: u8, guest_cluster: u64, size: usize) -> Vec<u8> {
    let mut bytes = pattern(seed, guest_cluster, size);
    let mut random = Random::seeded(guest_cluster.wrapping_mul(2_654_435_761) ^ u64::from(seed));
    for byte in &mut bytes[..size / 8 * usize::from(seed / 32)] {
        *byte = random.byte();
    }
    bytes
}

struct File {
    bytes: Vec<u8>,
    size: usize,
    /// Clusters, as often as they are referred to.
    used: Vec<usize>,
    /// Where the next compressed cluster may go: a byte of the last cluster of the file, or its end.
    packed: usize,
}

impl File {
    fn allocate(&mut self, count: usize) -> usize {
        let first = self.bytes.len() / self.size;
        self.bytes.resize(self.bytes.len() + count * self.size, 0);
        self.used.extend(first..first + count);
        first * self.size
    }

    /// Append a compressed cluster; returns its L2 entry.
    fn pack(&mut self, stream: &[u8], cluster_bits: u32) -> u64 {
        // The room in the last cluster can be used if the stream fits, or if the file ends there.
        let room = self.packed.next_multiple_of(self.size) - self.packed;
        let open_end = self.packed + room == self.bytes.len();
        if room == 0 || (stream.len() > room && !open_end) {
            self.packed = self.bytes.len();
        }
        let (start, end) = (self.packed, self.packed + stream.len());
        // Whole sectors count, as far as they belong to the cluster.
        let touched = start / self.size..=(end - 1) / self.size;
        self.bytes.resize(self.bytes.len().max(end.next_multiple_of(self.size)), 0);
        self.used.extend(touched);
        self.put(start, stream);
        self.packed = end;
        let additional = (end - 1) / 512 - start / 512;
        let x = 62 - (cluster_bits - 8);
        1 << 62 | (additional as u64) << x | start as u64
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// Build an image and its data file, which is as long as the disk; what no entry refers to is stale there, unless it is `raw`.
pub fn build_outside(spec: &Spec, raw: bool) -> [Vec<u8>; 2] {
    let size = 1usize << spec.cluster_bits;
    let mut data = vec![if raw { 0 } else { 0xd5 }; spec.virtual_size as usize];
    for (&guest, &state) in &spec.clusters {
        let (State::Data(seed) | State::Mixed(seed, ..) | State::ZeroAllocated(seed)) = state else { continue };
        let start = guest as usize * size;
        let part = &mut data[start..];
        let length = part.len().min(size);
        part[..length].copy_from_slice(&pattern(seed, guest, size)[..length]);
    }
    let autoclear = spec.autoclear | if raw { 2 } else { 0 };
    [build(&Spec { outside: true, autoclear, ..spec.clone() }), data]
}

/// Build the image. Panics if the specification contradicts itself.
pub fn build(spec: &Spec) -> Vec<u8> {
    let size = 1usize << spec.cluster_bits;
    let width = if spec.extended { 16 } else { 8 };
    let per_table = (size / width) as u64;
    let mut file = File { bytes: Vec::new(), size, used: Vec::new(), packed: 0 };
    let header = file.allocate(1);
    let table = file.allocate(spec.table_clusters as usize);
    let l1_entries = spec.virtual_size.div_ceil(per_table << spec.cluster_bits).max(1);
    let l1 = file.allocate((l1_entries as usize * 8).div_ceil(size));
    file.allocate(spec.leaks as usize);
    for _ in 0..spec.free {
        let at = file.allocate(1);
        file.bytes[at..].fill(0xee);
        file.used.pop();
        // One that is leaked keeps them apart.
        file.allocate(1);
    }
    let per_block = (size * 8) >> spec.refcount_order;
    let early: Vec<usize> = if spec.blocks_first { (0..16).map(|_| file.allocate(1)).collect() } else { Vec::new() };
    let mut l2: BTreeMap<u64, usize> = BTreeMap::new();
    let owned = if spec.snapshots == 0 { 1 << 63 } else { 0 };
    let first_shared = file.bytes.len() / size;
    for (&guest, &state) in &spec.clusters {
        let index = guest / per_table;
        let l2_at = *l2.entry(index).or_insert_with(|| {
            let at = file.allocate(1);
            let entry = at as u64 | owned;
            file.put(l1 + index as usize * 8, &entry.to_be_bytes());
            at
        });
        let (mut allocated, mut zero) = match state {
            State::Data(_) => (u32::MAX, 0),
            State::Zero | State::ZeroAllocated(_) => (0, u32::MAX),
            State::Mixed(_, allocated, zero) => (allocated, zero),
            State::MixedZero(zero) => (0, zero),
            State::Deflated(_) | State::Compressed => (0, 0),
        };
        let flag = u64::from(!spec.extended);
        let entry = match state {
            State::Data(_) | State::Mixed(..) if spec.outside => guest << spec.cluster_bits | owned,
            State::ZeroAllocated(_) if spec.outside => guest << spec.cluster_bits | owned | flag,
            State::Data(seed) | State::Mixed(seed, ..) => {
                let at = file.allocate(1);
                file.put(at, &pattern(seed, guest, size));
                at as u64 | owned
            }
            State::Zero => flag,
            State::MixedZero(_) => 0,
            State::ZeroAllocated(seed) => {
                let at = file.allocate(1);
                file.put(at, &pattern(seed, guest, size));
                at as u64 | owned | flag
            }
            State::Deflated(seed) => {
                let stream = miniz_oxide::deflate::compress_to_vec(&mixed(seed, guest, size), 6);
                assert!(stream.len() < size, "{} bytes do not shrink", stream.len());
                file.pack(&stream, spec.cluster_bits)
            }
            State::Compressed => file.allocate(1) as u64 | 1 << 62,
        };
        let at = l2_at + (guest % per_table) as usize * width;
        file.put(at, &entry.to_be_bytes());
        if spec.extended {
            // What lies past the end of the disk has no state.
            let visible = (spec.virtual_size - (guest << spec.cluster_bits)).div_ceil(size as u64 / 32).min(32);
            let mask = u32::try_from((1u64 << visible) - 1).unwrap();
            (allocated, zero) = (allocated & mask, zero & mask);
            file.put(at + 8, &(u64::from(zero) << 32 | u64::from(allocated)).to_be_bytes());
        }
    }
    let shared = if spec.snapshots == 0 { 0..0 } else { first_shared..file.bytes.len() / size };
    let snapshot_table = add_snapshots(&mut file, spec, l1, l1_entries as usize);
    let directory = add_bitmaps(&mut file, spec);
    // Refcount blocks describe everything, themselves included.
    let mut blocks = 0;
    while (file.bytes.len() / size + if spec.blocks_first { 0 } else { blocks }).div_ceil(per_block) > blocks {
        blocks += 1;
    }
    let block_at: Vec<usize> =
        if spec.blocks_first { early[..blocks].to_vec() } else { (0..blocks).map(|_| file.allocate(1)).collect() };
    assert!(blocks * 8 <= spec.table_clusters as usize * size, "the refcount table is too small");
    if spec.blocks_first {
        // Those that are not needed are free.
        file.used.retain(|&cluster| !early[blocks..].contains(&(cluster * size)));
    }
    for (index, &at) in block_at.iter().enumerate() {
        file.put(table + index * 8, &(at as u64).to_be_bytes());
    }
    for cluster in file.used.clone() {
        let index = cluster % per_block;
        let bits = 1usize << spec.refcount_order;
        // Widths below a byte start at the least significant bit, others end there.
        let (byte, bit) = if bits < 8 { (index * bits / 8, index * bits % 8) } else { ((index + 1) * bits / 8 - 1, 0) };
        let times = if shared.contains(&cluster) { spec.snapshots + 1 } else { 1 };
        for _ in 0..times {
            increment(&mut file.bytes, block_at[cluster / per_block] + byte, bit, bits);
        }
    }
    let mut head = Vec::new();
    head.extend(b"QFI\xfb");
    head.extend(spec.version.to_be_bytes());
    head.extend([0; 12]);
    head.extend(spec.cluster_bits.to_be_bytes());
    head.extend(spec.virtual_size.to_be_bytes());
    head.extend(0u32.to_be_bytes());
    head.extend((l1_entries as u32).to_be_bytes());
    head.extend((l1 as u64).to_be_bytes());
    head.extend((table as u64).to_be_bytes());
    head.extend((spec.table_clusters as u32).to_be_bytes());
    head.extend((spec.snapshots as u32).to_be_bytes());
    head.extend((snapshot_table as u64).to_be_bytes());
    if spec.version == 3 {
        head.extend((u64::from(spec.extended) << 4 | u64::from(spec.outside) << 2).to_be_bytes());
        head.extend([0; 8]);
        head.extend(spec.autoclear.to_be_bytes());
        head.extend(spec.refcount_order.to_be_bytes());
        head.extend(104u32.to_be_bytes());
    }
    if spec.outside {
        head.extend(0x4441_5441u32.to_be_bytes());
        head.extend(4u32.to_be_bytes());
        head.extend(b"data\0\0\0\0");
    }
    if let Some((at, length)) = directory {
        head.extend(0x2385_2875u32.to_be_bytes());
        head.extend(24u32.to_be_bytes());
        head.extend((spec.bitmaps.len() as u32).to_be_bytes());
        head.extend([0; 4]);
        head.extend((length as u64).to_be_bytes());
        head.extend((at as u64).to_be_bytes());
    }
    file.put(header, &head);
    while spec.cut && file.bytes.last() == Some(&0) {
        file.bytes.pop();
    }
    file.bytes
}

/// Bitmaps with names of different lengths. Returns where their directory stands, and its length.
fn add_bitmaps(file: &mut File, spec: &Spec) -> Option<(usize, usize)> {
    let mut directory = Vec::new();
    for (number, bitmap) in spec.bitmaps.iter().enumerate() {
        // Bytes of the bitmap, and clusters of them.
        let bits = spec.virtual_size.div_ceil(1 << bitmap.granularity_bits) as usize;
        let clusters = bits.div_ceil(8).div_ceil(file.size).max(1);
        let table = file.allocate((clusters * 8).div_ceil(file.size));
        for index in 0..clusters {
            let state = bitmap.bits.get(index).or(bitmap.bits.last()).copied().unwrap_or(Bits::None);
            let entry = match state {
                Bits::None => 0,
                Bits::All => 1,
                Bits::Bytes(value) => {
                    let at = file.allocate(1);
                    for bit in index * file.size * 8..bits.min((index + 1) * file.size * 8) {
                        file.bytes[at + bit / 8 % file.size] |= value & 1 << (bit % 8);
                    }
                    at as u64
                }
            };
            file.put(table + index * 8, &entry.to_be_bytes());
        }
        directory.extend((table as u64).to_be_bytes());
        directory.extend((clusters as u32).to_be_bytes());
        directory.extend(bitmap.flags.to_be_bytes());
        directory.extend([1, bitmap.granularity_bits as u8]);
        directory.extend((number as u16 * 3 + 1).to_be_bytes());
        directory.extend((bitmap.extra_data.len() as u32).to_be_bytes());
        directory.extend(&bitmap.extra_data);
        directory.extend(vec![b'a' + number as u8; number * 3 + 1]);
        directory.resize(directory.len().next_multiple_of(8), 0);
    }
    if directory.is_empty() {
        return None;
    }
    let at = file.allocate(directory.len().div_ceil(file.size));
    file.put(at, &directory);
    Some((at, directory.len()))
}

/// Snapshots with names and extra data of different lengths. Returns where their table stands.
fn add_snapshots(file: &mut File, spec: &Spec, l1: usize, l1_entries: usize) -> usize {
    if spec.snapshots == 0 {
        return 0;
    }
    let mut table = Vec::new();
    for number in 0..spec.snapshots {
        let clusters = (l1_entries * 8).div_ceil(file.size);
        let at = file.allocate(clusters);
        let bytes = file.bytes[l1..l1 + l1_entries * 8].to_vec();
        file.put(at, &bytes);
        let name = vec![b'n'; number * 3];
        table.extend((at as u64).to_be_bytes());
        table.extend((l1_entries as u32).to_be_bytes());
        table.extend(1u16.to_be_bytes());
        table.extend((name.len() as u16).to_be_bytes());
        table.extend([0; 20]);
        table.extend(16u32.to_be_bytes());
        table.extend(0u64.to_be_bytes());
        table.extend(spec.virtual_size.to_be_bytes());
        table.push(b'1' + number as u8);
        table.extend(name);
        table.resize(table.len().next_multiple_of(8), 0);
    }
    let at = file.allocate(table.len().div_ceil(file.size));
    file.put(at, &table);
    at
}

/// One more to the refcount of `bits` bits whose lowest bit is bit `bit` of byte `at`.
fn increment(bytes: &mut [u8], mut at: usize, bit: usize, bits: usize) {
    if bits < 8 {
        assert!((bytes[at] >> bit & ((1 << bits) - 1)) as usize + 1 < 1 << bits, "refcount overflow");
        bytes[at] += 1 << bit;
        return;
    }
    while bytes[at] == 255 {
        bytes[at] = 0;
        at -= 1;
    }
    bytes[at] += 1;
}
