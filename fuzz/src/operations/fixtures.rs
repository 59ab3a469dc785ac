//! Valid images of every pair of formats.

use super::{Fixture, MIDDLE, OVERLAY};
use crate::formats::{Format, FORMATS};
use instar_guest_abi::DEVICE_OUTPUT;
use instar_testkit::Parts;
use std::fmt;
use std::sync::OnceLock;

/// Bytes of the disks of chains of several formats.
const CROSS_SIZE: usize = 64 << 10;

/// Chains of images that inputs of one fuzz target change and commit.
pub struct Pairs {
    /// Name of the target.
    pub target: String,
    /// The images: an input says which.
    pub fixtures: Vec<Fixture>,
}

impl Pairs {
    /// Those of all targets: of each format that has chains of its own, and of several formats.
    #[must_use]
    pub fn all() -> &'static [Self] {
        static ALL: OnceLock<Vec<Pairs>> = OnceLock::new();
        ALL.get_or_init(|| {
            let within = FORMATS.iter().map(|format| (format.label, within(format)));
            let all = within.chain([("cross", cross())]).filter(|(_, fixtures)| !fixtures.is_empty());
            all.map(|(name, fixtures)| Self { target: format!("{name}-commit"), fixtures }).collect()
        })
    }

    /// Those that the inputs of a fuzz target change.
    #[must_use]
    pub fn of_target(name: &str) -> Option<&'static Self> {
        Self::all().iter().find(|pairs| pairs.target == name)
    }

    /// The images that an input changes: its first byte says which.
    #[must_use]
    pub fn choose(&self, input: &[u8]) -> Option<&Fixture> {
        self.fixtures.get(usize::from(*input.first()?) % self.fixtures.len())
    }
}

impl fmt::Debug for Pairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.target)
    }
}

/// The chains of a format alone.
fn within(format: &'static Format) -> Vec<Fixture> {
    let fixture =
        |chain: Vec<(u32, Vec<u8>)>| Fixture::new(chain.into_iter().map(|(device, bytes)| (device, format, bytes)));
    format.kit.chains().into_iter().map(fixture).collect()
}

/// Overlays of each format into backings of every other, and with a layer of each format between them. Inputs name them by their
/// place: it depends on the order of the formats.
fn cross() -> Vec<Fixture> {
    let parts: Vec<(&'static Format, Parts)> =
        FORMATS.iter().rev().map(|format| (format, format.kit.parts(CROSS_SIZE))).collect();
    let mut fixtures = Vec::new();
    for (top, overlays) in parts.iter().map(|(top, parts)| (*top, &parts.overlays)) {
        for (base, backings) in parts.iter().map(|(base, parts)| (*base, &parts.backings)) {
            for (overlay, backing) in overlays.iter().zip(backings).filter(|_| top.label != base.label) {
                fixtures.push(Fixture::new([(OVERLAY, top, overlay.clone()), (DEVICE_OUTPUT, base, backing.clone())]));
            }
        }
        // A record of the parent's identity is what a layer between can get wrong: one of the base's own format has it, one of
        // a format that records none has not.
        let Some(overlay) = overlays.first().filter(|_| !top.kit.records_parent()) else { continue };
        let recorded = parts.iter().filter(|(base, _)| base.kit.records_parent());
        for (base, backing) in recorded.filter_map(|(base, parts)| Some((*base, parts.backings.get(1)?))) {
            let middles = parts.iter().filter_map(|(format, parts)| Some((*format, parts.middle.as_ref()?)));
            let fits = |format: &Format| format.name == base.name || !format.kit.records_parent();
            for (format, middle) in middles.filter(|(format, _)| fits(format)) {
                fixtures.push(Fixture::new([
                    (OVERLAY, top, overlay.clone()),
                    (MIDDLE, format, middle.clone()),
                    (DEVICE_OUTPUT, base, backing.clone()),
                ]));
            }
        }
    }
    fixtures
}
