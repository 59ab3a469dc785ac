//! What is promised of every driver, with VMware's delta disks: content, and every state that a power loss can leave. In each of
//! them the number of the first free sector is behind all that is in use, and in the file.
#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_sdk::abi::{DeviceConfig, DEVICE_OUTPUT};
use instar_guest_sdk::conformance::{verify, verify_drawn, Builder, Fixture, Held, ImageKit, Layer, ANCESTOR, OVERLAY};
use instar_guest_sdk::crash::{Crashes, Files};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::random::Random;
use instar_guest_sdk::{check_extents, Content, Extents};
use instar_vmdk_testkit::{CowdKit, SeSparseKit};

#[test]
fn grains_of_one_sector_and_of_more() {
    for grain in [512, 2048] {
        let report = verify_drawn(&CowdKit(grain), 0..8, Crashes { drawn: 1, seed: 1 });
        println!("grains of {grain}: {report:?}");
        assert!(report.committed >= 20 && report.states > 500, "{grain}: {report:?}");
    }
}

/// Tables that are there in the backing and tables that are not, over an ancestor, in disks of two tables.
#[test]
fn new_tables_and_those_that_are_there() {
    let kit = CowdKit(512);
    let layer = |seed, grains: &[usize]| {
        let mut held = vec![Held::Nothing; 4103];
        grains.iter().for_each(|&grain| held[grain] = Held::Data);
        Layer { size: 4103 * 512, cluster: 512, held, has_backing: true, seed }
    };
    let overlay = layer(1, &[0, 1, 2, 4095, 4096, 4102]);
    for backing in [layer(2, &[]), layer(2, &[1, 3, 4101])] {
        let ancestor = layer(3, &[0, 1, 2, 3, 4, 4095, 4096, 4097]);
        let images = [(OVERLAY, &overlay), (DEVICE_OUTPUT, &backing), (ANCESTOR, &ancestor)];
        let files: Files = images.into_iter().map(|(number, layer)| (number, kit.build(layer))).collect();
        let report = verify(&Fixture { overlay: &kit, backing: &kit, files }, Crashes { drawn: 0, seed: 1 });
        println!("{report:?}");
        assert!(report.committed == 1 && report.states > 20, "{report:?}");
    }
}

/// A seSparse extent keeps the promises of a source: whatever part of the disk is asked for.
#[test]
fn sesparse_is_read_as_it_was_made() {
    let kit = SeSparseKit;
    let random = &mut Random::seeded(5);
    for number in 0..40u8 {
        let grains = 1 + random.index(9000);
        let size = (grains * 4096 - random.index(8) * 512) as u64;
        let mut held = vec![Held::Nothing; grains];
        for _ in 0..random.index(200) {
            let (at, state) = (random.index(grains), [Held::Data, Held::Zero, Held::Nothing][random.index(3)]);
            held.iter_mut().skip(at).take(1 + random.index(6)).for_each(|held| *held = state);
        }
        let layer = Layer { size, cluster: 4096, held, has_backing: true, seed: number };
        let image = kit.build(&layer);
        let below = vec![0x5a; size as usize];
        let wanted = layer.content(&below);
        assert!(kit.content(&image, Some(&below)) == wanted);
        let mut io = MemoryDevices::new([(0, image.clone())]);
        let info = kit.info(&image);
        let device = DeviceConfig {
            device: 0,
            file_length: image.len() as u64,
            max_length: u64::MAX,
            virtual_size: info.virtual_size,
            cluster_size: info.cluster_size,
            ..DeviceConfig::default()
        };
        let mut source = kit.open_source(&mut io, &device).unwrap();
        assert_eq!(source.verify(&mut io, false).unwrap(), layer.clusters().count() as u64);
        let found = source.check(&mut io, &mut |_, text| panic!("{text}")).unwrap();
        assert_eq!(found.corruptions, 0);
        let (mut read, mut at) = (below, 0);
        while at < size {
            let mut extents = Extents::with_room_for(1 + random.index(5));
            let end = size.min(at + 1 + random.index(4 << 20) as u64);
            let next = source.extents(&mut io, at..end, &mut extents).unwrap();
            check_extents(&extents, at, next, size).unwrap();
            for extent in extents.iter() {
                let place = &mut read[extent.guest_offset as usize..extent.end() as usize];
                match extent.content {
                    Content::Zero => place.fill(0),
                    Content::Data { offset, .. } => place.copy_from_slice(&image[offset as usize..][..place.len()]),
                    other => panic!("{other:?}"),
                }
            }
            at = next;
        }
        assert!(read == wanted, "image {number} reads wrong");
        assert!(source.verify(&mut io, true).unwrap_err().text.contains("cannot be emptied"));
        assert!(kit.open_sink(&mut io, &device, false).err().unwrap().text.contains("cannot be written to"));
        assert_eq!(io.log, vec![]);
    }
}
