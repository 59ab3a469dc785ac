//! Entries of L2 tables, decoded, and what they say of a cluster of the guest.

use crate::image::Image;
use alloc::format;
use alloc::string::String;
use instar_guest_sdk::DriverResult;
use instar_qcow2_format::{incompatible, CompressedRange, EntryError, L2Entry, Subclusters, SUBCLUSTERS};

/// A cluster that a layer holds something of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped {
    /// Guest offset in bytes.
    pub(crate) guest: u64,
    /// Where the entry stands in the file, in bytes.
    pub(crate) at: u64,
    /// The entry.
    pub(crate) entry: L2Entry,
    /// The state of its subclusters, if they are not all alike.
    pub(crate) subclusters: Option<Subclusters>,
}

impl Mapped {
    /// How many bytes from the start of the host cluster are the guest's.
    pub(crate) fn data_end(&self, image: &Image) -> u64 {
        let visible = image.cluster_size().bytes().min(image.header.virtual_size.saturating_sub(self.guest));
        match (self.entry, self.subclusters) {
            (L2Entry::Data { .. }, None) => visible,
            (L2Entry::Data { .. }, Some(subclusters)) => {
                let used = u64::from(SUBCLUSTERS - subclusters.allocated.leading_zeros());
                visible.min(image.cluster_size().bytes() / u64::from(SUBCLUSTERS) * used)
            }
            _ => 0,
        }
    }

    /// What is wrong if the file ends before the data of the guest does, as one that a copy has cut off: QEMU reads zeroes from
    /// there on. A data file may end anywhere.
    pub(crate) fn cut_off(&self, image: &Image) -> Option<String> {
        let L2Entry::Data { offset, .. } = self.entry else { return None };
        if image.data.is_some() {
            return None;
        }
        let (guest, needed) = (self.guest, self.data_end(image));
        (!image.holds_bytes(offset, needed)).then(|| {
            format!(
                "the file is cut off: the cluster of guest offset {guest}, at offset {offset}, lies past its end, or its last part \
                 does"
            )
        })
    }
}

/// Refuse an entry that leads to another place of the data file than the cluster's own ("Standard Cluster Descriptor").
///
/// # Errors
/// Corruption.
pub(crate) fn verify_place(image: &Image, mapped: &Mapped) -> DriverResult<()> {
    if image.data.is_none() {
        return Ok(());
    }
    match mapped.entry.host() {
        Some((offset, _)) if offset.0 != mapped.guest => {
            let text = format!(
                "the L2 entry of guest offset {} points to offset {offset} of the data file, where only that guest offset may be",
                mapped.guest
            );
            Err(image.corrupt(mapped.at, text))
        }
        _ => Ok(()),
    }
}

/// Decode an entry of an L2 table, of 8 or of 16 bytes.
pub(crate) fn decode_entry(image: &Image, raw: &[u8]) -> Result<(L2Entry, Option<Subclusters>), EntryError> {
    let half = |bytes: Option<&[u8]>| bytes.and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
    decode_halves(image, half(raw.get(..8)), half(raw.get(8..16)))
}

/// The same, from its halves; a standard entry has no second one.
pub(crate) fn decode_halves(
    image: &Image,
    entry: u64,
    bitmap: u64,
) -> Result<(L2Entry, Option<Subclusters>), EntryError> {
    let (size, version) = (image.cluster_size(), image.header.version);
    if image.data.is_some() {
        if image.header.has(incompatible::EXTENDED_L2) {
            return Subclusters::decode_outside(entry, bitmap, size);
        }
        return L2Entry::decode_outside(entry, size, version).map(|entry| (entry, None));
    }
    if image.header.has(incompatible::EXTENDED_L2) {
        return Subclusters::decode(entry, bitmap, size);
    }
    L2Entry::decode(entry, size, version).map(|entry| (entry, None))
}

/// Where a compressed cluster is, verified to lie in the file; only its last sector may be cut off.
pub(crate) fn compressed_range(image: &Image, guest: u64, at: u64, descriptor: u64) -> DriverResult<CompressedRange> {
    let range = CompressedRange::decode(descriptor, image.cluster_size());
    if image.holds_bytes(range.last_sector(), 1) {
        return Ok(range);
    }
    Err(image.corrupt(
        at,
        format!(
            "the L2 entry of guest offset {guest} points to offset {} and {} compressed bytes, past the end of the file",
            range.offset, range.length
        ),
    ))
}
