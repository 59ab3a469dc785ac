//! What the header and the format extension say, as facts and features.

use instar_parallels_format::{Extension, Header, InUse, Trouble, Variant, HEADER_BYTES, SECTOR};
use instar_plugin_api::std_types::ROption;
use instar_plugin_api::{
    BackingPointer, ErrorCode, Feature, ImageFacts, ImageReader, PluginError, PROBE_CERTAIN, PROBE_NO,
};

/// Names of the features.
pub mod names {
    /// What entries of the BAT count, a word.
    pub const ENTRIES: &str = "bat-entries-count";
    /// Bytes of a cluster, a number: any multiple of 512, of which the facts have the largest power of two.
    pub const CLUSTER: &str = "bytes-per-cluster";
    /// How many dirty bitmaps the format extension has, a number; absent without one.
    pub const BITMAPS: &str = "dirty-bitmaps";
    /// Where the data begins in the file, in bytes: what a verdict counts with.
    pub const DATA_START: &str = "data-start";
    /// There is a format extension, which goes with the first change: true or absent.
    pub const EXTENSION: &str = "format-extension";
    /// Why nothing of the file can be changed, a clause; absent if it can.
    pub const UNCHANGEABLE: &str = "unchangeable";
    /// Why nothing can be written into the image, a clause; absent if it can.
    pub const READ_ONLY: &str = "read-only";
}

/// The largest cluster in bytes whose format extension is looked at, all of which has to be read.
const MOST_EXTENSION: u64 = 4 << 20;

/// See [`FormatPlugin::probe`](instar_plugin_api::FormatPlugin::probe). Magic word and version, as in `parallels_probe`.
pub fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
    let start = image.read_vec(0, HEADER_BYTES)?;
    let is_one = start.get(..16).and_then(Variant::of).is_some() && start.get(16..20) == Some(&[2, 0, 0, 0]);
    Ok(if is_one && start.len() == HEADER_BYTES { PROBE_CERTAIN } else { PROBE_NO })
}

/// The format extension, or why it cannot be read.
fn extension(image: &ImageReader<'_>, header: &Header) -> Result<Result<Extension, String>, PluginError> {
    let size = header.cluster_bytes();
    if size > MOST_EXTENSION {
        return Ok(Err(format!("the format extension, of {size} bytes, is too long to be looked at")));
    }
    let start = header.ext_off.checked_mul(SECTOR).filter(|&start| start >= header.floor());
    let bytes = match (start, usize::try_from(size)) {
        (Some(start), Ok(size)) => image.read_vec(start, size)?,
        _ => Vec::new(),
    };
    if bytes.len() as u64 != size {
        return Ok(Err("the format extension does not lie where data can".to_owned()));
    }
    Ok(Extension::parse(&bytes).map_err(|error| error.text))
}

/// See [`FormatPlugin::facts`](instar_plugin_api::FormatPlugin::facts).
pub fn read(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
    let mut bytes = [0; HEADER_BYTES];
    image.read_exact_at(0, &mut bytes)?;
    let header = Header::parse(&bytes).map_err(|error| {
        let code = match error.trouble {
            Trouble::Unsupported => ErrorCode::UnsupportedFormat,
            Trouble::Corrupt => ErrorCode::ParseFailed,
        };
        PluginError::new(code, error.text)
    })?;
    let facts = ImageFacts::new("parallels", header.virtual_size(), header.unit(), image.length());
    // Each cluster lies in the file as a whole.
    let clusters = image.length().saturating_sub(header.floor()) / header.cluster_bytes();
    let units = clusters.min(header.entries.into()).saturating_mul(header.cluster_bytes() / header.unit());
    let mut facts = facts.with_clusters_at_most(units);
    // The format has no place for a parent: only the operator knows.
    facts.backing = ROption::RSome(BackingPointer::new(Vec::new(), None));
    facts.parent_identity_unique = true;
    facts.dirty = header.in_use == InUse::Open;
    let count = if header.variant == Variant::Sectors { "sectors" } else { "clusters" };
    facts.features.push(Feature::text(names::ENTRIES, count, true));
    facts.features.push(Feature::number(names::CLUSTER, header.cluster_bytes(), true));
    facts.features.push(Feature::number(names::DATA_START, header.data_start(), false));
    if header.ext_off != 0 {
        facts.features.push(Feature::flag(names::EXTENSION, true, true));
        match extension(image, &header)? {
            Ok(extension) => {
                facts.features.push(Feature::number(names::BITMAPS, extension.bitmaps() as u64, true));
                let why = extension.must_stay();
                facts.features.extend(why.map(|why| Feature::text(names::UNCHANGEABLE, &why, false)));
            }
            // It may say that nothing must be changed without it.
            Err(why) => facts.features.push(Feature::text(names::UNCHANGEABLE, &why, false)),
        }
    }
    if !header.data_is_aligned() {
        let text = format!(
            "data_off is sector {}, which is not the start of a cluster of {} sectors, as QEMU leaves such images: copy \
             it with `qemu-img convert`",
            header.data_off, header.tracks
        );
        facts.features.push(Feature::text(names::READ_ONLY, &text, false));
    }
    Ok(facts)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_parallels_format::{
        checksum, create, field, CreateOptions, DIRTY_BITMAP, EXTENSION_HEAD, EXTENSION_MAGIC,
    };

    const CLUSTER: usize = 4096;

    fn facts(change: impl FnOnce(&mut Vec<u8>)) -> Result<ImageFacts, PluginError> {
        let made = create(&CreateOptions { virtual_size: 5 << 20, cluster: CLUSTER as u64 }).unwrap();
        let mut bytes = made.start.to_vec();
        bytes.resize(usize::try_from(made.length).unwrap(), 0);
        change(&mut bytes);
        read(&ImageReader::new(bytes.len() as u64, &bytes))
    }

    /// Put a format extension with one section behind everything.
    fn extend(bytes: &mut Vec<u8>, magic: u64, flags: u64) {
        let start = bytes.len();
        bytes[field::EXT_OFF..field::EXT_OFF + 8].copy_from_slice(&(start as u64 / SECTOR).to_le_bytes());
        let mut cluster = vec![0; CLUSTER];
        let section = [magic, flags, 32].map(u64::to_le_bytes).concat();
        cluster[EXTENSION_HEAD..EXTENSION_HEAD + 24].copy_from_slice(&section);
        let sum = checksum(&cluster[EXTENSION_HEAD..]);
        cluster[..8].copy_from_slice(&EXTENSION_MAGIC.to_le_bytes());
        cluster[8..EXTENSION_HEAD].copy_from_slice(&sum);
        bytes.extend(cluster);
    }

    #[test]
    fn no_parent_is_recorded_and_one_may_be_named() {
        let facts = facts(|_| {}).unwrap();
        let pointer = facts.backing.clone().into_option().unwrap();
        assert!(pointer.name.is_empty() && pointer.other_names.is_empty() && pointer.format.is_none());
        assert!(facts.parent_identity_unique && facts.parent_identity.is_empty() && facts.identity.is_empty());
        assert_eq!((facts.virtual_size, facts.cluster_size, facts.max_allocated_clusters), (5 << 20, 4096, 0));
        assert_eq!((facts.number(names::CLUSTER), facts.text(names::ENTRIES)), (Some(4096), Some("clusters")));
        assert!(!facts.dirty && facts.bitmaps.is_none());
    }

    #[test]
    fn a_cluster_of_any_number_of_sectors_has_a_power_of_two() {
        let facts = facts(|bytes| {
            bytes[..16].copy_from_slice(Variant::Sectors.magic());
            bytes[field::TRACKS] = 12;
            bytes.resize(CLUSTER * 2 + 3 * 12 * 512 + 100, 0);
        });
        let facts = facts.unwrap();
        assert_eq!((facts.cluster_size, facts.number(names::CLUSTER)), (2048, Some(6144)));
        assert_eq!(facts.max_allocated_clusters, 3 * 3);
        assert!(facts.text(names::READ_ONLY).is_none());
    }

    #[test]
    fn what_is_odd_is_a_feature() {
        assert!(facts(|bytes| bytes[field::IN_USE..field::IN_USE + 4].copy_from_slice(b"Ynot")).unwrap().dirty);
        let unaligned = facts(|bytes| bytes[field::DATA_OFF] += 1).unwrap();
        assert!(unaligned.text(names::READ_ONLY).unwrap().contains("not the start of a cluster"));
        let bitmap = facts(|bytes| extend(bytes, DIRTY_BITMAP, 0)).unwrap();
        assert_eq!((bitmap.number(names::BITMAPS), bitmap.text(names::UNCHANGEABLE)), (Some(1), None));
        for (magic, flags, kept) in [(7, 0, false), (7, 2, true), (7, 1, true), (DIRTY_BITMAP, 1, true)] {
            let facts = facts(|bytes| extend(bytes, magic, flags)).unwrap();
            assert_eq!(facts.text(names::UNCHANGEABLE).is_some(), kept, "{magic} {flags}");
        }
        let broken = facts(|bytes| {
            extend(bytes, DIRTY_BITMAP, 0);
            let end = bytes.len();
            bytes[end - 1] = 1;
        });
        assert!(broken.unwrap().text(names::UNCHANGEABLE).unwrap().contains("checksum"));
        let nowhere = facts(|bytes| bytes[field::EXT_OFF] = 99).unwrap();
        assert!(nowhere.text(names::UNCHANGEABLE).unwrap().contains("does not lie where data can"));
    }

    #[test]
    fn a_file_is_told_by_its_start() {
        let ask = |bytes: &[u8]| probe(&ImageReader::new(bytes.len() as u64, &bytes.to_vec())).unwrap();
        let image = create(&CreateOptions { virtual_size: 512, cluster: 512 }).unwrap().start;
        assert_eq!((ask(&image), ask(&image[..63])), (PROBE_CERTAIN, PROBE_NO));
        assert_eq!(ask(&[&image[..16], &[3], &image[17..]].concat()), PROBE_NO);
        assert_eq!(facts(|bytes| bytes[16] = 3).unwrap_err().code, ErrorCode::UnsupportedFormat.number());
        assert_eq!(facts(|bytes| bytes.truncate(63)).unwrap_err().code, ErrorCode::ParseFailed.number());
    }
}
