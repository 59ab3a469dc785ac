//! Images to be built, and building them.

use crate::put64;
use miniz_oxide::deflate::compress_to_vec;
use std::collections::BTreeMap;

/// Bytes of a cluster, if a spec says nothing else.
pub const CLUSTER: usize = 1024;

/// What a cluster holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The bytes of [`fill`] for this seed.
    Data(u8),
    /// The same, compressed.
    Packed(u8),
}

/// An image to be built.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Bytes of the disk.
    pub size: usize,
    /// The binary logarithm of a cluster's bytes.
    pub cluster_bits: u8,
    /// The binary logarithm of an L2 table's entries.
    pub l2_bits: u8,
    /// The backing file's name, behind the header.
    pub name: Vec<u8>,
    /// Clusters that the image holds, by their number; in the file in this order.
    pub clusters: Vec<(usize, State)>,
    /// Bytes behind everything that is used.
    pub tail: usize,
}

impl Spec {
    /// An empty image, with the L2 tables that are the smallest: 64 entries.
    pub fn new(size: usize, name: &[u8]) -> Self {
        Self { size, cluster_bits: 10, l2_bits: 6, name: name.to_vec(), clusters: Vec::new(), tail: 0 }
    }

    /// The same image with these clusters as well.
    pub fn with(mut self, clusters: impl IntoIterator<Item = (usize, State)>) -> Self {
        self.clusters.extend(clusters);
        self
    }
}

/// The bytes of a cluster, different for each cluster and seed; zeroes for seed 0.
pub fn fill(cluster: usize, seed: u8, length: usize) -> Vec<u8> {
    let byte = |at: usize| (at / 29) as u8 ^ seed ^ (cluster as u8).wrapping_mul(31) | 1;
    (0..length).map(|at| if seed == 0 { 0 } else { byte(at) }).collect()
}

/// Build the image.
pub fn build(spec: &Spec) -> Vec<u8> {
    let cluster = 1 << spec.cluster_bits;
    let content = |(number, state): &(usize, State)| match state {
        State::Data(seed) => (*number, fill(*number, *seed, cluster), false),
        State::Packed(seed) => (*number, fill(*number, *seed, cluster), true),
    };
    assemble(spec, spec.clusters.iter().map(content))
}

/// Build the image with this content: number of the cluster, its bytes, whether they are to be compressed.
pub fn assemble(spec: &Spec, clusters: impl Iterator<Item = (usize, Vec<u8>, bool)>) -> Vec<u8> {
    let (cluster, entries) = (1usize << spec.cluster_bits, 1usize << spec.l2_bits);
    let l1 = (48 + spec.name.len()).next_multiple_of(8);
    let tables = spec.size.div_ceil(cluster * entries);
    let mut file = b"QFI\xfb\0\0\0\x01".to_vec();
    file.resize(l1 + tables * 8, 0);
    if !spec.name.is_empty() {
        put64(&mut file, 8, 48);
        put64(&mut file, 12, spec.name.len() as u64 | 48 << 32);
        file[48..48 + spec.name.len()].copy_from_slice(&spec.name);
    }
    put64(&mut file, 24, spec.size as u64);
    (file[32], file[33]) = (spec.cluster_bits, spec.l2_bits);
    put64(&mut file, 40, l1 as u64);
    let mut made = BTreeMap::new();
    for (number, mut bytes, packed) in clusters {
        let table = *made.entry(number / entries).or_insert_with(|| {
            let table = file.len().next_multiple_of(cluster);
            file.resize(table + entries * 8, 0);
            put64(&mut file, l1 + number / entries * 8, table as u64);
            table
        });
        bytes.resize(cluster, 0);
        let entry = if packed {
            let stream = compress_to_vec(&bytes, 9);
            assert!(stream.len() < cluster, "{} bytes do not compress", bytes.len());
            let at = file.len();
            file.extend(&stream);
            1 << 63 | (stream.len() as u64) << (63 - spec.cluster_bits) | at as u64
        } else {
            let at = file.len().next_multiple_of(cluster);
            file.resize(at, 0x77);
            file.extend(&bytes);
            at as u64
        };
        put64(&mut file, table + number % entries * 8, entry);
    }
    let end = file.len() + spec.tail;
    file.resize(end, 0x99);
    file
}
