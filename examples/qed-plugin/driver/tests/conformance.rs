//! The driver against the SDK's harness: images are built and read here, by code that the driver does not have.

use instar_guest_sdk::abi::{DeviceConfig, ImageInfo};
use instar_guest_sdk::conformance::{sink_of, source_of, verify_drawn, Builder, Held, ImageKit, Layer};
use instar_guest_sdk::crash::Crashes;
use instar_guest_sdk::{BlockIo, DriverResult, Sink, Source};
use qed_driver::Qed;
use std::collections::BTreeSet;

/// Bytes of a cluster, and of a table: the least that there may be.
const CLUSTER: usize = 4096;

struct Kit;

fn put(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn get(image: &[u8], at: usize) -> usize {
    u64::from_le_bytes(image[at..at + 8].try_into().unwrap()) as usize
}

/// The tables that the L1 table names.
fn tables(image: &[u8]) -> Vec<(usize, usize)> {
    let l1 = get(image, 40);
    let all = (0..CLUSTER / 8).map(|index| (index, get(image, l1 + index * 8)));
    all.filter(|(_, table)| *table != 0).collect()
}

/// What the L2 tables hold: guest cluster, and 1 or an offset.
fn entries(image: &[u8]) -> Vec<(usize, usize)> {
    let of = |(index, table): (usize, usize)| {
        (0..CLUSTER / 8).map(move |entry| (index * CLUSTER / 8 + entry, get(image, table + entry * 8)))
    };
    tables(image).into_iter().flat_map(of).filter(|(_, entry)| *entry != 0).collect()
}

impl ImageKit for Kit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Qed>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Qed>(io, device, has_backing)
    }

    fn info(&self, image: &[u8]) -> ImageInfo {
        ImageInfo { virtual_size: get(image, 48) as u64, cluster_size: CLUSTER as u64 }
    }

    fn content(&self, image: &[u8], below: Option<&[u8]>) -> Vec<u8> {
        let mut disk = below.unwrap_or_default().to_vec();
        disk.resize(get(image, 48), 0);
        for (cluster, entry) in entries(image) {
            let place = disk.chunks_mut(CLUSTER).nth(cluster).unwrap();
            match entry {
                1 => place.fill(0),
                // The last cluster of the file may be cut.
                _ => (place.iter_mut().enumerate())
                    .for_each(|(at, byte)| *byte = image.get(entry + at).copied().unwrap_or(0)),
            }
        }
        disk
    }

    /// Tables and clusters are in the file, and none is in two places.
    fn is_sound(&self, image: &[u8]) -> bool {
        let mut used = BTreeSet::from([0, get(image, 40)]);
        let places = tables(image).into_iter().chain(entries(image)).filter(|(_, at)| *at != 1);
        places.into_iter().all(|(_, at)| at % CLUSTER == 0 && at + CLUSTER <= image.len() && used.insert(at))
    }
}

impl Builder for Kit {
    fn cluster(&self) -> u64 {
        CLUSTER as u64
    }

    /// Header, L1 table, L2 table, clusters.
    fn build(&self, layer: &Layer) -> Vec<u8> {
        let mut image = vec![0; 3 * CLUSTER];
        image[..4].copy_from_slice(b"QED\0");
        // cluster_size, table_size, header_size, features.
        put(&mut image, 4, CLUSTER as u64 | 1 << 32);
        put(&mut image, 12, 1);
        put(&mut image, 16, u64::from(layer.has_backing));
        put(&mut image, 40, CLUSTER as u64);
        put(&mut image, 48, layer.size);
        // Where the backing's name is, and its length.
        put(&mut image, 56, if layer.has_backing { 64 | 4 << 32 } else { 0 });
        image[64..68].copy_from_slice(b"base");
        put(&mut image, CLUSTER, 2 * CLUSTER as u64);
        for (cluster, held) in layer.clusters() {
            let entry = if held == Held::Zero { 1 } else { image.len() as u64 };
            put(&mut image, 2 * CLUSTER + cluster as usize * 8, entry);
            if held == Held::Data {
                image.extend(layer.bytes(cluster));
                image.resize(image.len().next_multiple_of(CLUSTER), 0);
            }
        }
        image
    }
}

#[test]
fn qed_conforms() {
    let report = verify_drawn(&Kit, 0..6, Crashes { drawn: 1, seed: 1 });
    assert!(report.committed >= 12 && report.states > 500, "{report:?}");
}
