//! New images: every option is found again, and the refcounts count exactly the clusters in use.
#![allow(clippy::unwrap_used, missing_docs)]

use instar_qcow2_format::{
    autoclear, compatible, create, get_refcount, incompatible, ClusterSize, CompressionType, CreateOptions,
    ExtensionKind, Header, HostOffset, Preallocation, RefcountOrder, RefcountTableEntry, Version,
};
use proptest::prelude::*;

fn options() -> impl Strategy<Value = CreateOptions> {
    let name = prop::collection::vec(any::<u8>(), 1..200);
    let format = prop::collection::vec(any::<u8>(), 1..20);
    (
        9..22u32,
        any::<u64>(),
        any::<bool>(),
        0..7u32,
        any::<[bool; 2]>(),
        prop::option::of(name),
        prop::option::of(format),
    )
        .prop_map(|(bits, seed, v2, order, [lazy, zstd], backing_name, backing_format)| {
            let cluster_size = ClusterSize::from_bits(bits).unwrap();
            // Up to 1000 L1 entries, and any rest.
            let virtual_size = seed % (cluster_size.l2_coverage() * 1000);
            CreateOptions {
                virtual_size,
                version: if v2 { Version::V2 } else { Version::V3 },
                cluster_size,
                refcount_order: if v2 { RefcountOrder::BITS_16 } else { RefcountOrder::new(order).unwrap() },
                lazy_refcounts: lazy && !v2,
                compression: if zstd && !v2 { CompressionType::Zstd } else { CompressionType::Zlib },
                extended_l2: false,
                preallocation: Preallocation::Off,
                backing_name,
                backing_format,
            }
        })
}

proptest! {
    #[test]
    fn every_option_is_found_again(options in options()) {
        let image = create(&options).unwrap();
        let h = Header::parse(&image.metadata).unwrap();
        prop_assert_eq!((h.version, h.cluster_size), (options.version, options.cluster_size));
        prop_assert_eq!(h.virtual_size, options.virtual_size.next_multiple_of(512));
        prop_assert_eq!((h.refcount_order, h.compression), (options.refcount_order, options.compression));
        let zstd = options.compression == CompressionType::Zstd;
        prop_assert_eq!(h.incompatible, if zstd { incompatible::COMPRESSION_TYPE } else { 0 });
        prop_assert_eq!(h.compatible, if options.lazy_refcounts { compatible::LAZY_REFCOUNTS } else { 0 });
        prop_assert_eq!((h.autoclear, h.crypt_method, h.snapshots, h.snapshot_table), (0, 0, 0, HostOffset(0)));
        prop_assert_eq!(&h.backing_name, &options.backing_name);
        let format = options.backing_name.as_ref().and(options.backing_format.as_deref());
        prop_assert_eq!(h.backing_format(), format);
        prop_assert_eq!(u64::from(h.l1_entries), h.virtual_size.div_ceil(h.l2_coverage()));
        let named = h.extension(ExtensionKind::FeatureNames).is_some();
        prop_assert_eq!(named, options.version == Version::V3 && options.cluster_size.bits() >= 13);
        if named {
            prop_assert_eq!(h.feature_name(0, 0).unwrap(), b"dirty bit");
            prop_assert_eq!(h.feature_name(2, 0).unwrap(), b"bitmaps");
            prop_assert_eq!(autoclear::BITMAPS, 1 << 0);
        }
    }

    #[test]
    fn refcounts_count_what_is_there(options in options()) {
        let image = create(&options).unwrap();
        let h = Header::parse(&image.metadata).unwrap();
        let size = h.cluster_size;
        let mut used = vec![false; usize::try_from(size.count_for(image.length)).unwrap()];
        let mut claim = |at: u64, bytes: u64| {
            assert_eq!(size.offset_in(at), 0);
            for cluster in at >> size.bits()..size.count_for(at + bytes) {
                let taken = &mut used[usize::try_from(cluster).unwrap()];
                assert!(!*taken, "cluster {cluster} is used twice");
                *taken = true;
            }
        };
        claim(0, size.bytes());
        claim(h.refcount_table.0, h.refcount_table_bytes());
        claim(h.l1_table.0, h.l1_bytes());
        let table = usize::try_from(h.refcount_table.0).unwrap();
        let mut blocks = Vec::new();
        for entry in image.metadata[table..][..usize::try_from(h.refcount_table_bytes()).unwrap()].chunks_exact(8) {
            match RefcountTableEntry::decode(u64::from_be_bytes(entry.try_into().unwrap()), size).unwrap() {
                RefcountTableEntry::Block(at) => {
                    claim(at.0, size.bytes());
                    blocks.push(Some(at));
                }
                RefcountTableEntry::Unallocated => blocks.push(None),
            }
        }
        // Nothing lies between the structures, and nothing is counted beyond them.
        prop_assert!(used.iter().all(|&used| used));
        let per_block = usize::try_from(h.refcount_order.entries_in(size.bytes())).unwrap();
        for (number, at) in blocks.iter().enumerate() {
            let Some(at) = at else {
                prop_assert!(number * per_block >= used.len());
                continue;
            };
            let start = usize::try_from(at.0).unwrap();
            let block = &image.metadata[start..][..usize::try_from(size.bytes()).unwrap()];
            for index in 0..per_block {
                let expected = u64::from(number * per_block + index < used.len());
                prop_assert_eq!(get_refcount(block, h.refcount_order, index), Some(expected));
            }
        }
    }
}

#[test]
fn names_fill_the_first_cluster_but_no_more() {
    let mut options = CreateOptions::new(1 << 20);
    options.cluster_size = ClusterSize::from_bits(9).unwrap();
    // 112 bytes of header, and 8 of the end marker.
    options.backing_name = Some(vec![b'a'; 512 - 120]);
    let image = create(&options).unwrap();
    assert_eq!(Header::parse(&image.metadata).unwrap().backing_name, options.backing_name);
    options.backing_name = Some(vec![b'a'; 512 - 119]);
    assert!(create(&options).unwrap_err().to_string().contains("does not fit"));
    options.cluster_size = ClusterSize::DEFAULT;
    options.backing_name = Some(vec![b'a'; 1023]);
    assert!(create(&options).is_ok());
}
