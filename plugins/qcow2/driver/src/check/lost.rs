//! The parts of the disk that cannot be read because of impossible entries: a repair that drops those entries would
//! lose them.

use crate::image::Image;
use crate::metadata::entries::{decode_l1, scan_table};
use crate::metadata::l2_entry::decode_halves;
use crate::metadata::map::MetadataMap;
use alloc::format;
use alloc::string::String;
use instar_guest_sdk::{BlockIo, DriverResult};
use instar_qcow2_format::{CompressedRange, HostOffset, L2Entry};

/// Clusters of the disk that no entry leads to, although one says that it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost {
    /// How many.
    clusters: u64,
    /// Guest offset in bytes of the first one.
    first: Option<u64>,
}

impl Lost {
    fn add(&mut self, guest: u64, clusters: u64) {
        if clusters == 0 {
            return;
        }
        self.clusters = self.clusters.saturating_add(clusters);
        self.first = self.first.or(Some(guest));
    }

    /// In one clause.
    pub(crate) fn clause(self) -> String {
        match self.first {
            None => String::from("no cluster of the disk as it is now is concerned"),
            Some(first) if self.clusters == 1 => format!("the cluster of the disk at guest offset {first}"),
            Some(first) => format!("{} clusters of the disk, the first at guest offset {first}", self.clusters),
        }
    }
}

/// Look for what cannot be read of the active state. No more tables are read than the file has room for: L1 entries that
/// share one are damage themselves.
///
/// # Errors
/// I/O errors.
pub(crate) fn lost(io: &mut dyn BlockIo, image: &Image) -> DriverResult<Lost> {
    let mut found = Lost::default();
    // Where structures overlap, nobody knows which of them is one.
    let metadata = match MetadataMap::build(io, image, alloc::vec::Vec::new()) {
        Err(error) if error.code != image.corrupt_code() => return Err(error),
        built => built.ok(),
    };
    let header = &image.header;
    let (coverage, cluster, width) = (header.l2_coverage(), image.cluster_size().bytes(), header.l2_entry_bytes());
    let mut tables = alloc::vec::Vec::new();
    scan_table(io, image, header.l1_table, header.l1_entries.into(), &mut |index, at, raw| {
        let guest = index.saturating_mul(coverage);
        match decode_l1(image, index, at, raw) {
            Ok(Some((table, _))) if (tables.len() as u64) < image.clustered_length() / cluster => {
                tables.push((guest, table));
            }
            Ok(_) => {}
            Err(_) => found.add(guest, coverage.min(header.virtual_size.saturating_sub(guest)).div_ceil(cluster)),
        }
        Ok(())
    })?;
    for (start, table) in tables {
        // Of an extended entry, the first half comes by itself.
        let mut half = None;
        scan_table(io, image, table, cluster / 8, &mut |index, _, raw| {
            let (number, is_second) = (index * 8 / width, index * 8 % width != 0);
            let (first, second) = match half.take() {
                Some((of, first)) if is_second && of == number => (first, raw),
                _ if is_second => (0, raw),
                _ => (raw, 0),
            };
            if width == 16 && !is_second {
                half = Some((number, raw));
            }
            let readable = is_readable(image, metadata.as_ref(), first, second);
            let guest = start.saturating_add(number * cluster);
            // Entries behind the disk's end are no part of it.
            if !readable && (width == 8 || is_second) && guest < header.virtual_size {
                found.add(guest, 1);
            }
            Ok(())
        })?;
    }
    Ok(found)
}

/// Whether what an entry refers to can be read.
fn is_readable(image: &Image, metadata: Option<&MetadataMap>, first: u64, second: u64) -> bool {
    let Ok((entry, _)) = decode_halves(image, first, second) else { return false };
    let is_data = |offset: HostOffset| metadata.is_none_or(|metadata| !metadata.contains(image.host_cluster(offset)));
    if let L2Entry::Compressed { descriptor } = entry {
        let range = CompressedRange::decode(descriptor, image.cluster_size());
        return image.holds_bytes(range.last_sector(), 1) && is_data(range.offset) && is_data(range.last_sector());
    }
    image.own_host(entry).is_none_or(|(offset, _)| image.holds_cluster(offset) && is_data(offset))
}
