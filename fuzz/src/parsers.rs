//! The format library: no panic on any bytes, and what was decoded encodes to the same.

use instar_qcow2_format::{
    decompress as decode, get_refcount, set_refcount, Bitmap, BitmapTableEntry, Bitmaps, ClusterSize, CompressedRange,
    CompressionType, CreateOptions, FeatureName, Header, HostCluster, L1Entry, L2Entry, RefcountOrder,
    RefcountTableEntry, Snapshot, Subclusters, Version, BITMAP_ENTRY_BYTES,
};

/// The header with its extensions.
pub fn header(data: &[u8]) {
    let _ = instar_qcow2_format::header_bytes_needed(data);
    if let Ok(header) = Header::parse(data) {
        let _ = (header.backing_format(), header.bitmaps(), header.feature_name(0, 3));
        let _ = (header.l1_bytes(), header.refcount_table_bytes(), header.l2_coverage());
        assert!(header.l1_bytes() <= instar_qcow2_format::MAX_L1_BYTES);
        for extension in &header.extensions {
            let _ = FeatureName::parse_table(&extension.data);
            let _ = Bitmaps::checked(&extension.data, header.cluster_size);
        }
    }
}

/// Images that are as they should be.
#[must_use]
pub fn header_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for version in [Version::V2, Version::V3] {
        for backing in [None, Some("base.qcow2")] {
            let options = CreateOptions {
                version,
                backing_name: backing.map(|name| name.as_bytes().to_vec()),
                backing_format: backing.map(|_| b"qcow2".to_vec()),
                ..CreateOptions::new(1 << 30)
            };
            let image = instar_qcow2_format::create(&options).unwrap();
            seeds.push(image.metadata[..1024].to_vec());
        }
    }
    seeds
}

/// Entries of every table, for every cluster size and refcount width.
pub fn tables(data: &[u8]) {
    let [bits, order, index, rest @ ..] = data else { return };
    let size = ClusterSize::from_bits(9 + u32::from(bits % 13)).unwrap();
    let order = RefcountOrder::new(u32::from(order % 7)).unwrap();
    for raw in rest.chunks_exact(16) {
        let [first, second] = [&raw[..8], &raw[8..]].map(|half| u64::from_be_bytes(half.try_into().unwrap()));
        if let Ok(entry) = L1Entry::decode(first, size) {
            assert_eq!(L1Entry::decode(entry.encode(), size), Ok(entry));
        }
        for version in [Version::V2, Version::V3] {
            if let Ok(entry) = L2Entry::decode(first, size, version) {
                assert_eq!(L2Entry::decode(entry.encode(), size, version), Ok(entry));
                let _ = entry.host();
            }
        }
        if let Ok((entry, Some(mixed))) = Subclusters::decode(first, second, size) {
            assert_eq!(Subclusters::decode(mixed.encode(entry.host()).0, second, size), Ok((entry, Some(mixed))));
            assert!(mixed.runs().count() <= 32);
        }
        if let Ok(entry) = BitmapTableEntry::decode(first, size) {
            assert_eq!(BitmapTableEntry::decode(entry.encode(), size), Ok(entry));
        }
        let _ = RefcountTableEntry::decode(first, size);
        let range = CompressedRange::decode(first & !(3 << 62), size);
        let _ = (range.end(), range.last_sector());
        assert!(
            range.host_clusters(size).count() <= 3,
            "a compressed cluster touches two clusters at most, and a sector"
        );
        let _ = order.locate(size, HostCluster(first));
    }
    let mut block = rest.to_vec();
    let index = usize::from(*index);
    if let Some(count) = get_refcount(&block, order, index) {
        assert!(count <= order.max());
        set_refcount(&mut block, order, index, count).unwrap();
        assert_eq!(block, rest, "writing what was read changes something");
        set_refcount(&mut block, order, index, order.max()).unwrap();
        assert_eq!(get_refcount(&block, order, index), Some(order.max()));
    }
}

/// The tables, and what is a table of entries of different lengths.
pub fn all_tables(data: &[u8]) {
    tables(data);
    snapshots(data);
}

/// The snapshot table and the bitmap directory.
pub fn snapshots(data: &[u8]) {
    let mut at = 0;
    while let Ok(Some((_, next))) = Snapshot::parse(data, at, 4096) {
        // The last entry may lack its padding.
        assert!(next > at && next <= data.len().next_multiple_of(8), "an entry from {at} to {next} of {}", data.len());
        at = next;
    }
    for fixed in data.windows(BITMAP_ENTRY_BYTES).step_by(8) {
        let size = ClusterSize::from_bits(9 + u32::from(fixed[0] % 13)).unwrap();
        if let Ok(bitmap) = Bitmap::parse(fixed.try_into().unwrap(), size) {
            assert!(bitmap.entry_bytes().is_multiple_of(8));
            let _ = (bitmap.table_bytes(), bitmap.coverage(size), bitmap.is_recording());
        }
    }
}

/// Entries of many kinds, some of them valid.
#[must_use]
pub fn table_seeds() -> Vec<Vec<u8>> {
    let entries = [0, 1, 0x5_0000, 1 << 63 | 0x7_0000, 1 << 62 | 0x1234, 0xffff_ffff, 0x30_0000 | 1, 1 << 32];
    let table: Vec<u8> = entries.iter().flat_map(|entry: &u64| entry.to_be_bytes()).collect();
    let mut snapshot = vec![0; 96];
    snapshot[13] = 2;
    snapshot[15] = 5;
    snapshot[39] = 16;
    (0..13).map(|bits| [vec![bits, bits, bits * 3], table.clone()].concat()).chain([snapshot]).collect()
}

/// A compressed cluster: the first byte says how.
pub fn decompress(data: &[u8]) {
    let [kind, stream @ ..] = data else { return };
    let kind = if kind % 2 == 0 { CompressionType::Zlib } else { CompressionType::Zstd };
    for bytes in [512, 4096, 65536] {
        let mut output = vec![0; bytes];
        let _ = decode(kind, stream, &mut output);
    }
}

/// Real streams. (Of zstd those that `qemu-img` made of 4 KiB of text and of one byte.)
#[must_use]
pub fn stream_seeds() -> Vec<Vec<u8>> {
    let text: Vec<u8> = (0..4096u32).map(|i| b"instar commits overlays. "[(i * i % 25) as usize]).collect();
    let mut seeds: Vec<Vec<u8>> = [0, 1, 6, 9]
        .iter()
        .map(|&level| [vec![0], miniz_oxide::deflate::compress_to_vec(&text, level)].concat())
        .collect();
    for stream in [&include_bytes!("../seeds/text.zst")[..], &include_bytes!("../seeds/same.zst")[..]] {
        seeds.push([vec![1], stream.to_vec()].concat());
    }
    seeds
}
