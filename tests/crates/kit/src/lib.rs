//! What the testkit of a format offers to tests and fuzz targets that know no format.
//!
//! Each format has a crate `plugins/NAME/testkit` with a [`FormatKit`]: valid images, a reader and a checker that share no code
//! with the driver, and the driver itself (the SDK's [`ImageKit`]). Who commits, damages or reads images of any format needs
//! nothing else, so that a format joins the fuzz targets with one line (`fuzz/src/formats.rs`).

pub mod chain;

mod layout;
pub mod mended;
mod padded;
pub mod pair;
pub mod rebase;
mod salvage;
pub mod trial;

pub use chain::Place;
pub use layout::{ByteOrder, Field, Layout};
pub use padded::{copy_padded, padded};
pub use salvage::{little, part, seen, Disk, SectorState, LONGEST, SECTOR};

pub use instar_guest_sdk::conformance::{sink_of, source_of, ImageKit, ANCESTOR, OVERLAY};

use instar_guest_abi::IMAGE_ID_MAX;
use instar_guest_sdk::crash::Crashes;
use instar_guest_sdk::random::Random;

/// Device number of a layer between overlay and backing, which is committed with the overlay.
pub const MIDDLE: u32 = 2;

/// The images of one commit by their devices, the top-most first: [`OVERLAY`], [`MIDDLE`] if it is there, the output device, and
/// [`ANCESTOR`] if it is there.
pub type Chain = Vec<(u32, Vec<u8>)>;

/// How many random states `make crash` draws after each change; `None` in the tests.
#[must_use]
pub fn crash_states_drawn() -> Option<usize> {
    std::env::var("INSTAR_CRASH_DRAWN").ok().and_then(|drawn| drawn.parse().ok())
}

/// The crash states that a test looks at: `make crash` draws more random ones than the tests do.
#[must_use]
pub fn crashes() -> Crashes {
    Crashes { drawn: crash_states_drawn().unwrap_or(1), seed: 1 }
}

/// Images for chains with images of other formats. All disks have the size that was asked for, unless a backing may grow to it.
#[derive(Clone, Debug, Default)]
pub struct Parts {
    /// Images to be committed.
    pub overlays: Vec<Vec<u8>>,
    /// A layer between an overlay and a backing, whose identity the layer records if the format has one.
    pub middle: Option<Vec<u8>>,
    /// Images to commit into.
    pub backings: Vec<Vec<u8>>,
}

/// A format, as tests know it.
///
/// Functions that take `bytes` may panic if these make no image of the format; [`salvage`](FormatKit::salvage) may not.
pub trait FormatKit: ImageKit {
    /// What a valid image is made of.
    fn layout(&self, bytes: &[u8]) -> Layout;

    /// What an image holds, sector by sector, as far as damage lets that be read; `None` if the header makes no sense, or the
    /// disk is longer than [`LONGEST`].
    fn salvage(&self, bytes: &[u8]) -> Option<Disk>;

    /// [`FormatKit::salvage`] for each internal snapshot.
    fn salvage_snapshots(&self, bytes: &[u8]) -> Vec<Option<Disk>> {
        let _ = bytes;
        Vec::new()
    }

    /// Whether images have metadata, which a checker can look at.
    fn has_metadata(&self) -> bool {
        true
    }

    /// Whether [`is_sound`](ImageKit::is_sound) looks at all that the driver's check looks at, so that the driver must find
    /// nothing in an image that is sound.
    fn checks_everything(&self) -> bool {
        false
    }

    /// Whether images record the identity of their parents: committing into a parent may change that record, and nothing else.
    fn records_parent(&self) -> bool {
        false
    }

    /// Whether two images differ by the recorded identity of the parent and its mark, and nothing else. By default these are no
    /// more bytes than an identity and a number have, in one sector.
    fn differ_by_parent(&self, was: &[u8], is: &[u8]) -> bool {
        let differ = |at: &usize| was[*at] != is[*at];
        let places = || (0..was.len()).filter(differ);
        was.len() == is.len()
            && places().take(IMAGE_ID_MAX + 5).count() <= IMAGE_ID_MAX + 4
            && places().next().zip(places().next_back()).is_none_or(|(first, last)| first / SECTOR == last / SECTOR)
    }

    /// Make the checksums right of all structures that have one and can still be told for what they are: without that, damage
    /// below a checksum never reaches what reads the structure.
    fn seal(&self, bytes: &mut [u8]) {
        let _ = bytes;
    }

    /// Whether an image that records the identity of its parent goes with this one, as the engine decides.
    fn goes_with(&self, bytes: &[u8], parent: &[u8]) -> bool {
        let _ = (bytes, parent);
        true
    }

    /// Valid chains of this format alone, of every kind that the driver treats in its own way. Inputs of the fuzz targets name
    /// them by their place in this list.
    fn chains(&self) -> Vec<Chain> {
        Vec::new()
    }

    /// A valid image for this place in a chain, of whatever kind the numbers say; `None` if the format has none for it.
    fn drawn(&self, random: &mut Random, place: Place) -> Option<Vec<u8>> {
        let _ = (random, place);
        None
    }

    /// Whether images go over images of any format, as they record no identity of their parents.
    fn goes_over_any(&self) -> bool {
        false
    }

    /// Valid images of this format for chains with others; `size` is that of the disk in bytes.
    fn parts(&self, size: usize) -> Parts {
        let _ = size;
        Parts::default()
    }
}
