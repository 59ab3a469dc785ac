//! The bitmaps of the committed layers: the space that they may take, and the guest's report of what happened to each.

use super::as_text::bytes_as_text;
use super::verdict::Parts;
use crate::escape::{escape_bytes, escape_path};
use instar_guest_protocol::commit::{bitmap::Fate, Bitmap};
use instar_plugin_api::ImageFacts;
use serde::Serialize;
use std::path::Path;

/// A bitmap of the committed layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MergedBitmap {
    /// Its name, as the bytes in the image.
    #[serde(serialize_with = "bytes_as_text")]
    pub name: Vec<u8>,
    /// Bytes of the disk that a bit stands for, in the top-most layer that has it.
    pub granularity: u64,
    /// Its fate: `merged`, `made`, or the reason why it is skipped.
    pub result: &'static str,
}

/// How many bitmaps an image has.
pub fn count(facts: &ImageFacts) -> u64 {
    facts.bitmaps.as_ref().into_option().map_or(0, |bitmaps| bitmaps.len() as u64)
}

/// The name of each fate in JSON.
pub const RESULTS: [(Fate, &str); 7] = [
    (Fate::Merged, "merged"),
    (Fate::Made, "made"),
    (Fate::Inconsistent, "inconsistent"),
    (Fate::Disabled, "disabled"),
    (Fate::Interrupted, "interrupted"),
    (Fate::TargetInconsistent, "target-inconsistent"),
    (Fate::TargetDisabled, "target-disabled"),
];

impl MergedBitmap {
    /// Take the bitmap that the guest reports; `None` if it reports an impossible fate.
    pub fn of(told: Bitmap) -> Option<Self> {
        let fate = Fate::try_from(told.fate).ok()?;
        let (_, result) = RESULTS.iter().find(|(known, _)| *known == fate)?;
        let valid = (1..=1023).contains(&told.name.len()) && told.granularity.is_power_of_two();
        valid.then_some(Self { name: told.name, granularity: told.granularity, result })
    }

    /// Whether the target has it afterwards, with all of its bits.
    #[must_use]
    pub fn is_merged(&self) -> bool {
        matches!(self.result, "merged" | "made")
    }

    /// The line about a bitmap that is skipped.
    pub fn warning(&self, overlay: &Path, target: &Path) -> Option<String> {
        let (name, overlay, target) = (escape_bytes(&self.name), escape_path(overlay), escape_path(target));
        let why = match self.result {
            "inconsistent" => "it was not saved when a layer was closed".to_owned(),
            "disabled" => "it is disabled".to_owned(),
            "interrupted" => "a layer above one that has it lacks it".to_owned(),
            "target-inconsistent" => format!("that of '{target}' was not saved when the image was closed"),
            "target-disabled" => format!("that of '{target}' is disabled"),
            _ => return None,
        };
        Some(format!("'{overlay}': its bitmap '{name}' is not merged, because {why}: the next backup that uses it has to be a full one"))
    }
}

/// The maximum in bytes by which the bitmaps of these layers, if they are made in the target, lengthen its file, beyond
/// what a plugin allows for the target's own. `virtual_size` is that of the target, in bytes.
pub fn allowance<'f>(target: &ImageFacts, layers: impl IntoIterator<Item = &'f ImageFacts>, virtual_size: u64) -> u64 {
    let cluster = target.cluster_size.max(512);
    let clusters = |bytes: u64| bytes.div_ceil(cluster);
    let own = target.bitmaps.as_ref().map_or(&[][..], |own| own.as_slice());
    let names: u64 = own.iter().map(|bitmap| bitmap.name.len() as u64 + 64).sum();
    let mut all = clusters(names.saturating_add(4096)).saturating_add(8);
    for layer in layers {
        for bitmap in layer.bitmaps.as_ref().map_or(&[][..], |own| own.as_slice()) {
            // Bits, the table that names their clusters, and the entry of the directory with its extra data.
            let data = clusters(virtual_size.div_ceil(bitmap.granularity.max(1)).div_ceil(8));
            let table = clusters(data.saturating_mul(8));
            all =
                all.saturating_add(data).saturating_add(table).saturating_add(clusters(bitmap.name.len() as u64 + 32));
        }
    }
    // Refcount blocks take less than the clusters they describe, and the table that names them less again.
    all.saturating_mul(3).saturating_mul(cluster)
}

/// The line about the layers' bitmaps in a commit that merges none.
pub fn left_out(parts: &Parts<'_, '_>) -> Option<String> {
    let count: usize = parts.merged().map(|layer| layer.facts.bitmaps.as_ref().map_or(0, |own| own.len())).sum();
    let overlay = escape_path(&parts.overlay.opened.path);
    match count {
        0 => None,
        1 => Some(format!(
            "'{overlay}': one bitmap of what is committed is not merged into the target's: --bitmaps does so"
        )),
        _ => Some(format!(
            "'{overlay}': {count} bitmaps of what is committed are not merged into the target's: --bitmaps does so"
        )),
    }
}
