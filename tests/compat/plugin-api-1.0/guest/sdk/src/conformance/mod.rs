//! A test harness that verifies whether a driver keeps the promises of its traits. The tests of any plugin can use it.
//!
//! You write code that makes images and code that reads them, and share neither with the driver ([`ImageKit`], [`Builder`]).
//! The harness does the rest, on [`MemoryDevices`](crate::memory::MemoryDevices), which hold the driver to all of the host's
//! rules:
//!
//! - **extents** keep their promises, whatever part of a disk is asked for, and however few at once; what they say, encoded
//!   ones included, is what the independent reader reads; `extents`, `verify` and `check` change nothing;
//! - a **commit** is done, refused or run dry: the backing reads as the overlay did, nobody's file is longer than was planned,
//!   and a commit that is refused has changed nothing;
//! - a **power loss**, and any request that **fails**: the overlay reads the same at each instant, both images are sound, and
//!   running the commit again finishes it;
//! - another **parent** ([`verify_parents`]): at each instant the image names the one or the other, whole, and reads the same; a
//!   refusal has changed nothing, and a second run finishes what was interrupted;
//! - another **size** ([`verify_resizes`]): at each instant the image has the one or the other and reads as before up to there;
//!   what an image has grown by reads as zeroes, also where it was shrunk before; a second run finishes what was interrupted.
//!
//! ```
//! use instar_guest_sdk::conformance::{self, Builder};
//! use instar_guest_sdk::crash::Crashes;
//!
//! fn my_format_conforms(kit: &dyn Builder) {
//!     conformance::verify_drawn(kit, 1..9, Crashes { drawn: 1, seed: 1 });
//! }
//! ```

mod commits;
mod fixture;
mod kit;
mod layer;
mod parents;
mod promises;
mod resizes;
mod sectors;

pub use fixture::{Fixture, ANCESTOR, OVERLAY};
pub use kit::{sink_of, source_of, Builder, ImageKit, ParentKit, Recorded};
pub use layer::{Held, Layer, SECTOR};
pub use parents::{verify_odd_parents, verify_parent, verify_parents, Relinks};
pub use resizes::{verify_resize, verify_resizes};

use crate::crash::{Crashes, Files};
use crate::random::Random;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_abi::DEVICE_OUTPUT;
use sectors::Sectors;

/// The number of cases that a verification has tried. A test can assert that they were not zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Commits that were done.
    pub committed: usize,
    /// Commits that were refused.
    pub refused: usize,
    /// States that a power loss can leave.
    pub states: usize,
}

impl core::ops::AddAssign for Report {
    fn add_assign(&mut self, other: Self) {
        self.committed += other.committed;
        self.refused += other.refused;
        self.states += other.states;
    }
}

/// Verify the sources of a fixture, and its commit.
///
/// # Panics
/// If a promise is broken.
pub fn verify(fixture: &Fixture<'_>, crashes: Crashes) -> Report {
    commits::sources(fixture, &mut Random::seeded(crashes.seed));
    commits::verify(fixture, crashes)
}

/// [`verify`] with these images of a format, all of them valid: as they are, and each role by itself, with images of the
/// harness's own format in the other one. The extents of those begin and end at any sector. The overlay of a format that is
/// only read keeps its content.
///
/// # Panics
/// If a promise is broken.
pub fn verify_images(kit: &dyn ImageKit, files: &Files, crashes: Crashes) -> Report {
    let random = &mut Random::seeded(crashes.seed);
    let mut report = Report::default();
    let mut fixture = |overlay, backing, files: Files| report += verify(&Fixture { overlay, backing, files }, crashes);
    if kit.can_empty() && kit.has_sink() {
        fixture(kit, kit, files.clone());
    }
    let size = |number: u32| kit.info(files.get(&number).map(Vec::as_slice).unwrap_or_default()).virtual_size;
    let mut own = |size: u64| Sectors.build(&Layer::drawn(random, (size, SECTOR), Sectors.states(), true));
    // The harness's own images do not grow.
    let (overlay, backing) = (own(size(OVERLAY)), own(size(OVERLAY).max(size(DEVICE_OUTPUT))));
    let with = |number: u32, image: Vec<u8>| {
        let mut files = files.clone();
        files.insert(number, image);
        files
    };
    if kit.has_sink() {
        fixture(&Sectors, kit, with(OVERLAY, overlay));
    }
    let mut read = with(DEVICE_OUTPUT, backing);
    read.remove(&ANCESTOR);
    if kit.can_empty() {
        fixture(kit, &Sectors, read);
    } else if kit.has_source() {
        let fixture = Fixture { overlay: kit, backing: &Sectors, files: read };
        commits::sources(&fixture, &mut Random::seeded(crashes.seed));
        report += commits::verify_kept(&fixture);
    }
    report
}

/// [`verify_images`] with images that are drawn, other ones for each number.
///
/// # Panics
/// If a promise is broken, if the format's reader does not read what its builder made, or if every commit is refused.
pub fn verify_drawn(kit: &dyn Builder, numbers: Range<u64>, crashes: Crashes) -> Report {
    let mut report = Report::default();
    for number in numbers {
        report += verify_images(kit, &drawn(kit, &mut Random::seeded(number)), Crashes { seed: number, ..crashes });
    }
    assert!(report.committed > 0, "every commit is refused: {report:?}");
    report
}

/// The images of one commit. The disks differ in length now and then, and may end within a cluster.
fn drawn(kit: &dyn Builder, random: &mut Random) -> Files {
    let (cluster, unit) = (kit.cluster(), kit.unit().max(1));
    let shortest = random.below(12).saturating_add(1);
    // Two more clusters than the shortest, or, where lengths differ, up to four.
    let length = |random: &mut Random, differs: bool| {
        let more = if differs { random.below(5) } else { 2 };
        let cut = if random.coin() { random.below((cluster / unit).max(1)).saturating_mul(unit) } else { 0 };
        shortest.saturating_add(more).saturating_mul(cluster).saturating_sub(cut)
    };
    let has_ancestor = random.coin();
    let size = length(random, false);
    let base = if random.coin() { length(random, true) } else { size };
    let mut layers = alloc::vec![(OVERLAY, size, true), (DEVICE_OUTPUT, base, has_ancestor)];
    if has_ancestor {
        layers.push((ANCESTOR, length(random, true), false));
    }
    let mut build = |(number, size, has_backing)| {
        let layer = Layer::drawn(random, (size, cluster), kit.states(), has_backing);
        let image = kit.build(&layer);
        let below = alloc::vec![0x5a; usize::try_from(size).unwrap_or(0)];
        let read = kit.content(&image, Some(&below));
        assert!(read == layer.content(&below), "the reader of the tests does not read what their builder made");
        (number, image)
    };
    layers.into_iter().map(&mut build).collect()
}
