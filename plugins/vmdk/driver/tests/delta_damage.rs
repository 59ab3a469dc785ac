//! Damaged delta disks: whatever stands in header, directory and tables, nothing panics, what is refused has changed nothing, and
//! a commit that is done has put into the backing what the overlay read as, by the reader of the tests.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

use instar_guest_commit::{commit, Commit, CommitFailure, Options, Step};
use instar_guest_sdk::abi::{device_flags, DeviceConfig, DEVICE_OUTPUT};
use instar_guest_sdk::conformance::{Builder, Held, ImageKit, Layer, OVERLAY};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::random::Random;
use instar_guest_view::Ancestors;
use instar_vmdk_testkit::{CowdKit, SeSparseKit};

/// Bytes of a packed image in front of its extent.
const EXTENT: usize = 4096;

fn layer(cluster: u64, seed: u8, held: &[(usize, Held)]) -> Layer {
    let mut all = vec![Held::Nothing; 20];
    held.iter().for_each(|&(at, held)| all[at] = held);
    Layer { size: 20 * cluster - 512, cluster, held: all, has_backing: true, seed }
}

fn device(number: u32, image: &[u8], cluster_size: u64, virtual_size: u64) -> DeviceConfig {
    DeviceConfig {
        flags: device_flags::PRESENT | device_flags::WRITABLE,
        device: number,
        file_length: image.len() as u64,
        // As a verdict that has not seen the header: a first free sector that is far away is refused.
        max_length: image.len() as u64 + (1 << 20),
        virtual_size,
        cluster_size,
        ..DeviceConfig::default()
    }
}

/// Put a number that may mean something, or nothing, somewhere.
fn damage(random: &mut Random, image: &mut [u8], fields: &[usize]) {
    for _ in 0..1 + random.index(2) {
        let at = EXTENT + *random.pick(fields);
        let end = (image.len() / 512) as u64;
        let values = [
            0,
            1,
            2,
            3,
            4,
            7,
            8,
            9,
            64,
            4096,
            end,
            end - 1,
            end + 1,
            u64::from(u32::MAX),
            1 << 31,
            3 << 60,
            1 << 60 | 1,
        ];
        let value = if random.coin() { *random.pick(&values) } else { random.below(1 << 16) };
        let width = *random.pick(&[1, 4, 4, 8]);
        let bytes = value.to_le_bytes();
        if let Some(place) = image.get_mut(at..at + width) {
            place.copy_from_slice(&bytes[..width]);
        }
    }
}

/// Commits a pair of damaged images; how many of the commits were done.
fn run(overlay: &dyn Builder, fields: &[usize], keep_overlay: bool, damaged: u32) -> usize {
    let random = &mut Random::seeded(u64::from(damaged) + fields.len() as u64);
    let top = layer(overlay.cluster(), 1, &[(0, Held::Data), (3, Held::Data), (4, Held::Data), (19, Held::Data)]);
    let backing = CowdKit(overlay.cluster() as usize);
    let base = layer(overlay.cluster(), 2, &[(1, Held::Data), (3, Held::Data)]);
    let (top, base) = (overlay.build(&top), backing.build(&base));
    let (size, cluster) = (20 * overlay.cluster() - 512, overlay.cluster());
    let mut done = 0;
    for _ in 0..3000 {
        let mut files = std::collections::BTreeMap::from([(OVERLAY, top.clone()), (DEVICE_OUTPUT, base.clone())]);
        damage(random, files.get_mut(&damaged).unwrap(), fields);
        let mut io = MemoryDevices::new(files.clone());
        let of = |number: u32| device(number, &files[&number], cluster, size);
        io.hold_commit(&of(OVERLAY), keep_overlay, &of(DEVICE_OUTPUT));
        let at = |error| CommitFailure { step: Step::Check, error };
        let options = Options { keep_overlay, ..Options::default() };
        let result = overlay.open_source(&mut io, &of(OVERLAY)).map_err(at).and_then(|mut source| {
            let mut sink = backing.open_sink(&mut io, &of(DEVICE_OUTPUT), false).map_err(at)?;
            let mut below = Ancestors::new(Vec::new());
            let mut images = Commit { source: source.as_mut(), sink: sink.as_mut(), below: &mut below };
            commit(&mut io, &mut images, options, &mut |_| {})
        });
        match result {
            Ok(_) => {
                let before = backing.content(&files[&DEVICE_OUTPUT], None);
                let wanted = overlay.content(&files[&OVERLAY], Some(&before));
                assert!(backing.content(&io.files[&DEVICE_OUTPUT], None) == wanted, "the backing reads wrong");
                assert!(overlay.content(&io.files[&OVERLAY], Some(&wanted)) == wanted, "the overlay reads wrong");
                done += 1;
            }
            Err(failure) => {
                assert!(matches!(failure.step, Step::Check | Step::Plan), "{:?}: {}", failure.step, failure.error);
                assert!(io.files == files, "something was changed: {}", failure.error);
            }
        }
    }
    done
}

#[test]
fn extents_of_esx() {
    // Header, directory, and what is at the beginning of the only table.
    let fields: Vec<usize> = (0..40).chain(2048..2056).chain((2560..2660).step_by(4)).collect();
    for damaged in [OVERLAY, DEVICE_OUTPUT] {
        let done = run(&CowdKit(512), &fields, false, damaged);
        assert!((50..2900).contains(&done), "{done} commits were done");
    }
}

#[test]
fn sesparse_extents() {
    // Both headers, directory, and what is at the beginning of table 1.
    let table = (16 + 64) * 512;
    let fields: Vec<usize> =
        (0..220).chain(512..560).chain(4096..4112).chain((table..table + 168).step_by(8)).collect();
    let done = run(&SeSparseKit, &fields, true, OVERLAY);
    assert!((50..2900).contains(&done), "{done} commits were done");
}
