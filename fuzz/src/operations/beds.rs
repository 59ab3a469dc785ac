//! Valid images of every pair of formats.

use super::{choose, Bed, Format, ANCESTOR, MIDDLE, OVERLAY};
use instar_guest_abi::DEVICE_OUTPUT;
use instar_qcow2_testkit::bitmaps::{BitmapSpec, Bits, AUTO, IN_USE};
use instar_qcow2_testkit::builder::{build, Spec, State};
use instar_qcow2_testkit::damage;
use instar_qcow2_testkit::pair::data;
use instar_vmdk_testkit as grains;
use std::sync::OnceLock;

/// Which formats are committed into which.
#[derive(Clone, Copy, Debug)]
pub enum Pairs {
    /// qcow2 into qcow2.
    Qcow2,
    /// vmdk into vmdk.
    Vmdk,
    /// qcow2 into raw and vmdk.
    Cross,
}

impl Pairs {
    /// Those that the inputs of a fuzz target change.
    #[must_use]
    pub fn of_target(name: &str) -> Option<Self> {
        match name {
            "qcow2-commit" => Some(Self::Qcow2),
            "vmdk-commit" => Some(Self::Vmdk),
            "cross-commit" => Some(Self::Cross),
            _ => None,
        }
    }

    /// The images that an input changes: its first byte says which.
    pub(super) fn choose(self, input: &[u8]) -> Option<&'static Bed> {
        static BEDS: [OnceLock<Vec<Bed>>; 3] = [const { OnceLock::new() }; 3];
        match self {
            Self::Qcow2 => choose(&BEDS[0], qcow2_beds, input),
            Self::Vmdk => choose(&BEDS[1], vmdk_beds, input),
            Self::Cross => choose(&BEDS[2], cross_beds, input),
        }
    }
}

/// qcow2 into qcow2: cluster sizes, refcount widths, versions, snapshots, bitmaps, subclusters, compression, repairs, growth.
pub fn qcow2_beds() -> Vec<Bed> {
    use Format::Qcow2;
    let mut beds = Vec::new();
    let extents = |spec: Spec| {
        spec.with(data([0, 1, 5, 40], 0x21)).with([
            (7, State::Zero),
            (8, State::ZeroAllocated(9)),
            (9, State::Deflated(3)),
        ])
    };
    for (bits, top, snapshots, order, version, extended) in [
        (9, 9, 0, 4, 3, false),
        (9, 10, 1, 3, 3, false),
        (12, 9, 0, 6, 3, false),
        (10, 10, 2, 4, 2, false),
        (14, 9, 1, 4, 3, true),
        (9, 12, 0, 5, 3, false),
    ] {
        let size = 96u64 << bits;
        let backing = Spec { snapshots, refcount_order: order, version, extended, free: 2, ..Spec::new(bits, size) };
        let backing = build(&backing.with(data([0, 3, 40], 0x43)).with([(2, State::Deflated(5))]));
        let ancestor = build(&Spec::new(bits, size).with(data(0..20, 0x66)));
        let overlay = build(&extents(Spec { snapshots: snapshots / 2, ..Spec::new(top, size) }));
        beds.push([(OVERLAY, overlay), (DEVICE_OUTPUT, backing), (ANCESTOR, ancestor)].to_vec());
    }
    // Subclusters on both sides.
    let mixed = [(3, State::Mixed(0x71, 0xff00, 0xff)), (4, State::MixedZero(0xf0f)), (5, State::Data(2))];
    let subclusters = Spec { extended: true, ..Spec::new(14, 40 << 14) };
    let under = subclusters.clone().with([(3, State::Mixed(0x17, 0xf, 0xf0)), (6, State::Deflated(4))]);
    beds.push([(OVERLAY, build(&subclusters.with(mixed))), (DEVICE_OUTPUT, build(&under))].to_vec());
    // Bitmaps, and growth.
    let bitmap = |flags, bits: &[Bits]| BitmapSpec::new(flags, 9, bits);
    let bitmaps = vec![
        bitmap(AUTO, &[Bits::None]),
        bitmap(AUTO, &[Bits::Bytes(0x81), Bits::None]),
        bitmap(AUTO | IN_USE, &[Bits::Bytes(0x18)]),
        bitmap(0, &[Bits::All]),
    ];
    for (size, snapshots) in [(300u64, 0), (90, 1)] {
        let spec = Spec { bitmaps: bitmaps.clone(), autoclear: 1, snapshots, ..Spec::new(9, size << 9) };
        let spec = spec.with(data([0, 3, 40], 0x43));
        beds.push([(OVERLAY, build(&extents(Spec::new(9, 300 << 9)))), (DEVICE_OUTPUT, build(&spec))].to_vec());
    }
    // Not closed cleanly, on one side each.
    for spoiled in [OVERLAY, DEVICE_OUTPUT] {
        let spec = Spec { snapshots: 1, leaks: 3, ..Spec::new(9, 96 << 9) };
        let mut images =
            [(OVERLAY, build(&extents(Spec::new(9, 96 << 9)))), (DEVICE_OUTPUT, build(&spec.with(data([0, 3], 7))))];
        images.iter_mut().filter(|(device, _)| *device == spoiled).for_each(|(_, bytes)| damage::spoil(bytes, 3));
        beds.push(images.to_vec());
    }
    // Two layers at once, the upper one longer; a refcount table that has to grow; blocks in front and a file that is cut.
    let middle = build(&Spec::new(9, 80 << 9).with(data([1, 2, 60], 0x55)));
    let backing = Spec { leaks: 4_000, refcount_order: 6, ..Spec::new(9, 96 << 9) }.with(data([0, 3], 0x43));
    let overlay = build(&extents(Spec::new(9, 96 << 9)));
    beds.push([(OVERLAY, overlay.clone()), (MIDDLE, middle), (DEVICE_OUTPUT, build(&backing))].to_vec());
    let cut = Spec { blocks_first: true, cut: true, ..Spec::new(9, 96 << 9) }.with(data([0, 3], 0x43));
    beds.push([(OVERLAY, overlay), (DEVICE_OUTPUT, build(&cut))].to_vec());
    // An overlay that ends within its last cluster, a refcount block: it gets that cluster back when it is emptied.
    let overlay = build(&extents(Spec { cut: true, ..Spec::new(12, 96 << 9) }));
    assert!(!overlay.len().is_multiple_of(4096));
    beds.push([(OVERLAY, overlay), (DEVICE_OUTPUT, build(&cut))].to_vec());

    let bed = |images: Vec<(u32, Vec<u8>)>| Bed {
        resize: true,
        ..Bed::new(images.into_iter().map(|(device, bytes)| (device, Qcow2, bytes)))
    };
    beds.into_iter().map(bed).collect()
}

/// vmdk into vmdk.
pub fn vmdk_beds() -> Vec<Bed> {
    use grains::{build, Spec, State, GRAIN};
    let size = 600 * GRAIN;
    let data = |grains: &[usize], seed| grains.iter().map(|&g| (g, State::Data(seed))).collect::<Vec<_>>();
    let top = Spec::new(size, 7, 5).with(data(&[0, 1, 5, 513, 599], 0x21)).with([(7, State::Zero)]);
    let base = Spec::new(size, 5, 4).with(data(&[0, 3, 40], 0x43)).with([(2, State::Zero)]);
    let root = Spec::new(size, 4, u32::MAX).with(data(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 513], 0x66));
    let streamed = Spec { compressed: true, redundant: false, ..top.clone() };
    let pairs = [
        (top.clone(), base.clone()),
        (top, Spec { lazy_tables: true, ..base.clone() }),
        (streamed.clone(), Spec { redundant: false, zeroed: false, grains: vec![], ..base.clone() }),
        (Spec { footer: true, ..streamed }, base),
    ];
    let bed = |(top, base): &(Spec, Spec)| {
        let images = [(OVERLAY, build(top)), (DEVICE_OUTPUT, build(base)), (ANCESTOR, build(&root))];
        Bed::new(images.map(|(device, bytes)| (device, Format::Vmdk, bytes)))
    };
    let mut beds: Vec<Bed> = pairs.iter().map(bed).collect();
    // Two layers at once: the lower one's record of its parent follows.
    let (top, base) = &pairs[0];
    let top = Spec { parent: 6, ..top.clone() };
    let middle = Spec::new(size, 6, 5).with(data(&[1, 2, 6, 599], 0x31));
    let images =
        [(OVERLAY, build(&top)), (MIDDLE, build(&middle)), (DEVICE_OUTPUT, build(base)), (ANCESTOR, build(&root))];
    beds.push(Bed::new(images.map(|(device, bytes)| (device, Format::Vmdk, bytes))));
    beds
}

/// qcow2 into raw and vmdk, also with a layer between them.
pub fn cross_beds() -> Vec<Bed> {
    use grains::GRAIN;
    let size = 64 * GRAIN as u64;
    let overlay = |bits, extended| {
        let spec = Spec { extended, ..Spec::new(bits, size) };
        let states = [(0, State::Data(0x21)), (1, State::Zero), (3, State::Deflated(3))];
        build(&spec.with(states).with(if bits < 12 { data([20, 21], 0x13) } else { vec![] }))
    };
    let vmdk = |lazy_tables, redundant| {
        let spec = grains::Spec { lazy_tables, redundant, ..grains::Spec::new(size as usize, 5, u32::MAX) };
        grains::build(&spec.with([(0, grains::State::Data(0x43)), (21, grains::State::Zero)]))
    };
    let raw = |length: u64| (0..length).map(|i| (i / 300) as u8 | 1).collect::<Vec<u8>>();
    let bed = |top: Vec<u8>, format, base: Vec<u8>| Bed {
        resize: format == Format::Raw,
        ..Bed::new([(OVERLAY, Format::Qcow2, top), (DEVICE_OUTPUT, format, base)])
    };
    let through = |middle, between: Vec<u8>| {
        let base = vmdk(true, true);
        Bed::new([
            (OVERLAY, Format::Qcow2, overlay(9, false)),
            (MIDDLE, middle, between),
            (DEVICE_OUTPUT, Format::Vmdk, base),
        ])
    };
    let between =
        grains::Spec::new(size as usize, 6, 5).with([(1, grains::State::Data(0x31)), (2, grains::State::Zero)]);
    vec![
        bed(overlay(9, false), Format::Raw, raw(size)),
        bed(overlay(12, false), Format::Raw, raw(size - 700)),
        bed(overlay(14, true), Format::Raw, raw(size / 2)),
        bed(overlay(9, false), Format::Vmdk, vmdk(false, true)),
        bed(overlay(12, false), Format::Vmdk, vmdk(true, true)),
        bed(overlay(14, true), Format::Vmdk, vmdk(true, false)),
        through(Format::Vmdk, grains::build(&between)),
        through(Format::Qcow2, overlay(10, false)),
    ]
}
