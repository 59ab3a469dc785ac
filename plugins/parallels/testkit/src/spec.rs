//! Images to be built, and building them.

use crate::{put32, CLOSED};

/// Bytes of a cluster, if a spec says nothing else.
pub const CLUSTER: usize = 1024;

/// The magic word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Entries count sectors.
    Sectors,
    /// Entries count clusters.
    Clusters,
}

impl Variant {
    /// The bytes of the word.
    pub const fn magic(self) -> &'static [u8; 16] {
        match self {
            Self::Sectors => b"WithoutFreeSpace",
            Self::Clusters => b"WithouFreSpacExt",
        }
    }
}

/// An image to be built.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The magic word.
    pub variant: Variant,
    /// Bytes of the disk, whole sectors.
    pub size: usize,
    /// Sectors of a cluster.
    pub tracks: usize,
    /// Entries of the BAT, at least as many as the disk has clusters.
    pub entries: usize,
    /// Sectors between the BAT and the data, of images that may have some.
    pub room: usize,
    /// `data_off` says where the data begins. It has to in images whose entries count clusters.
    pub says_where: bool,
    /// Clusters that the image holds, by their number, with the seed of their content; in the file in this order.
    pub clusters: Vec<(usize, u8)>,
    /// Clusters of the file that nothing uses: those with these numbers.
    pub gaps: Vec<usize>,
    /// Bytes behind everything that is used.
    pub tail: usize,
    /// `in_use`.
    pub in_use: u32,
    /// `flags`.
    pub flags: u32,
    /// The sections of a format extension, if there is one. It lies behind all clusters.
    pub sections: Option<Vec<Vec<u8>>>,
}

impl Spec {
    /// An empty image, with entries that count sectors.
    pub fn new(size: usize) -> Self {
        Self {
            variant: Variant::Sectors,
            size,
            tracks: CLUSTER / 512,
            entries: size.div_ceil(CLUSTER),
            room: 0,
            says_where: false,
            clusters: Vec::new(),
            gaps: Vec::new(),
            tail: 0,
            in_use: CLOSED,
            flags: 0,
            sections: None,
        }
    }

    /// The same with clusters of `tracks` sectors.
    pub fn of_tracks(self, tracks: usize) -> Self {
        Self { tracks, entries: self.size.div_ceil(tracks * 512), ..self }
    }

    /// The same of the newer variant.
    pub fn newer(self) -> Self {
        Self { variant: Variant::Clusters, says_where: true, ..self }
    }

    /// The same image with these clusters as well.
    pub fn with(mut self, clusters: impl IntoIterator<Item = (usize, u8)>) -> Self {
        self.clusters.extend(clusters);
        self
    }
}

/// The bytes of a cluster, different for each cluster and seed; zeroes for seed 0.
pub fn fill(cluster: usize, seed: u8, length: usize) -> Vec<u8> {
    let byte = |at: usize| (at / 29) as u8 ^ seed ^ (cluster as u8).wrapping_mul(31) | 1;
    (0..length).map(|at| if seed == 0 { 0 } else { byte(at) }).collect()
}

/// A section of a format extension.
pub fn section(magic: u64, flags: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = [magic.to_le_bytes(), flags.to_le_bytes(), (data.len() as u64).to_le_bytes()].concat();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// The cluster of a format extension with these sections.
pub fn extension(sections: &[Vec<u8>], cluster: usize) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes.extend(sections.concat());
    assert!(bytes.len() + 24 <= cluster, "the sections do not fit");
    bytes.resize(cluster, 0);
    let sum = instar_parallels_format::checksum(&bytes[24..]);
    bytes[..8].copy_from_slice(&0xab23_4cef_23dc_ea87_u64.to_le_bytes());
    bytes[8..24].copy_from_slice(&sum);
    bytes
}

/// Build the image.
pub fn build(spec: &Spec) -> Vec<u8> {
    let cluster = spec.tracks * 512;
    assemble(spec, spec.clusters.iter().map(|(number, seed)| (*number, fill(*number, *seed, cluster))))
}

/// Build the image with this content: number of the cluster, and its bytes.
pub fn assemble(spec: &Spec, clusters: impl Iterator<Item = (usize, Vec<u8>)>) -> Vec<u8> {
    let (cluster, newer) = (spec.tracks * 512, spec.variant == Variant::Clusters);
    let mut data = (64 + spec.entries * 4).next_multiple_of(512);
    if newer || spec.says_where {
        data += spec.room * 512;
    }
    if newer {
        data = data.next_multiple_of(cluster);
    }
    let mut file = vec![0; data];
    file[..16].copy_from_slice(spec.variant.magic());
    for (at, number) in [
        (16, 2),
        (20, 16),
        (28, spec.tracks),
        (32, spec.entries),
        (36, spec.size / 512),
        (48, if newer || spec.says_where { data / 512 } else { 0 }),
    ] {
        put32(&mut file, at, number as u32);
    }
    put32(&mut file, 44, spec.in_use);
    put32(&mut file, 52, spec.flags);
    let unit = if newer { cluster } else { 512 };
    let mut next = 0;
    let mut take = |file: &mut Vec<u8>, bytes: &[u8]| {
        while spec.gaps.contains(&next) {
            next += 1;
        }
        let at = data + next * cluster;
        file.resize(at, 0x77);
        file.extend(bytes);
        file.resize(at + cluster, 0x55);
        next += 1;
        at
    };
    for (number, bytes) in clusters {
        let at = take(&mut file, &bytes);
        put32(&mut file, 64 + number * 4, (at / unit) as u32);
    }
    if let Some(sections) = &spec.sections {
        let at = take(&mut file, &extension(sections, cluster));
        put32(&mut file, 56, (at / 512) as u32);
    }
    let end = file.len() + spec.tail;
    file.resize(end, 0x99);
    file
}
