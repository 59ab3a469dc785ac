//! What a header says, in the terms of the plugin contract.

use crate::{data_file, listed};
use instar_plugin_api::std_types::ROption;
use instar_plugin_api::{BackingPointer, ErrorCode, Feature, ImageFacts, ImageReader, PluginError};
use instar_qcow2_format::{
    compatible, header_bytes_needed, incompatible, CompressionType, ExtensionKind, Header, HeaderError,
    HeaderErrorKind, Version,
};

/// Names of the features that verdicts look at and `instar info` does not show as `qemu-img info` does.
pub mod names {
    /// Number of internal snapshots.
    pub const SNAPSHOTS: &str = "snapshots";
    /// Number of persistent bitmaps.
    pub const BITMAPS: &str = "bitmap-count";
    /// `aes` or `luks`.
    pub const ENCRYPTION: &str = "encryption";
    /// Name of the external data file.
    pub const DATA_FILE: &str = "data-file";
    /// Whether the external data file is a disk of its own, too; absent without one.
    pub const DATA_FILE_RAW: &str = "data-file-raw";
    /// Length of the external data file in bytes; absent if it was not opened.
    pub const DATA_FILE_LENGTH: &str = "data-file-length";
    /// Why the image cannot be used with its data file, a clause; absent if nothing stands in the way.
    pub const DATA_FILE_REFUSED: &str = "data-file-refused";
    /// Incompatible feature bits that nothing is known of, as text.
    pub const UNKNOWN_FEATURES: &str = "unknown-incompatible-features";
    /// Width of refcounts in bits.
    pub const REFCOUNT_BITS: &str = "refcount-bits";
    /// 128-bit L2 entries.
    pub const EXTENDED_L2: &str = "extended-l2";
    /// `"0.10"` or `"1.1"`.
    pub const COMPAT: &str = "compat";
}

/// Bytes that hold a header without its extensions, and the smallest cluster.
const LEAST: u64 = 512;
/// Longest name of a snapshot or an unknown feature in a message, in characters.
pub const NAME_CHARS: usize = 46;

/// Read and parse the header.
pub fn read(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
    let header = header(image)?;
    let mut facts = facts(&header, image.length());
    if let Some(data_file) = image.file(0) {
        facts.file_length = facts.file_length.saturating_add(data_file.length());
        facts.features.push(Feature::number(names::DATA_FILE_LENGTH, data_file.length(), false));
    }
    facts.snapshots = listed::snapshots(image, &header).into();
    if header.version == Version::V3 {
        let bitmaps = listed::bitmaps(image, &header);
        if let Some(list) = listed::bitmap_list(&bitmaps) {
            // Where `qemu-img info` has it: before the width of the refcounts.
            let place = facts.features.iter().position(|feature| feature.name == names::REFCOUNT_BITS);
            facts.features.insert(place.unwrap_or(0), list);
        }
        facts.bitmaps = ROption::RSome(bitmaps.into());
    }
    Ok(facts)
}

/// The header of an image.
pub fn header(image: &ImageReader<'_>) -> Result<Header, PluginError> {
    let start = image.read_vec(0, 24)?;
    // At most 2 MiB; what is longer than the file is cut off by the reader. A header with a nonsensical cluster size gets as
    // far as the check of it.
    let needed = header_bytes_needed(&start).unwrap_or(LEAST);
    let bytes = image.read_vec(0, usize::try_from(needed.max(LEAST)).unwrap_or(0))?;
    Header::parse(&bytes).map_err(|error| refuse(&error))
}

fn refuse(error: &HeaderError) -> PluginError {
    let code = match error.kind {
        HeaderErrorKind::Unsupported => ErrorCode::UnsupportedFormat,
        HeaderErrorKind::NotQcow2 | HeaderErrorKind::Truncated | HeaderErrorKind::Corrupt => ErrorCode::ParseFailed,
    };
    PluginError::new(code, error.text.clone())
}

fn facts(header: &Header, file_length: u64) -> ImageFacts {
    let facts = ImageFacts::new("qcow2", header.virtual_size, header.cluster_size.bytes(), file_length);
    // Entries of 8 bytes or more, in tables that are not shared.
    let mut facts = facts.with_clusters_at_most(file_length.div_ceil(8));
    facts.dirty = header.has(incompatible::DIRTY);
    facts.corrupt = header.has(incompatible::CORRUPT);
    facts.encrypted = header.crypt_method != 0;
    facts.backing = match &header.backing_name {
        None => ROption::RNone,
        Some(name) => {
            let format = header.backing_format().filter(|format| !format.is_empty());
            ROption::RSome(BackingPointer::new(name.clone(), format.map(<[u8]>::to_vec)))
        }
    };
    facts.compresses = true;
    facts.features = features(header).into();
    facts
}

/// The features, first those of `qemu-img info` in its order.
fn features(header: &Header) -> Vec<Feature> {
    let v3 = header.version == Version::V3;
    let mut list = vec![Feature::text(names::COMPAT, if v3 { "1.1" } else { "0.10" }, true)];
    let compression = match header.compression {
        CompressionType::Zlib => "zlib",
        CompressionType::Zstd => "zstd",
    };
    list.push(Feature::text("compression-type", compression, true));
    if v3 {
        list.push(Feature::flag("lazy-refcounts", header.compatible & compatible::LAZY_REFCOUNTS != 0, true));
    }
    list.push(Feature::number(names::REFCOUNT_BITS, u64::from(header.refcount_order.bits()), true));
    if header.has(incompatible::DATA_FILE) {
        let name = data_file::recorded(header).map(String::from_utf8_lossy);
        list.extend(name.map(|name| Feature::text(names::DATA_FILE, &name, true)));
        list.push(Feature::flag(names::DATA_FILE_RAW, data_file::is_raw(header), true));
    }
    if v3 {
        list.push(Feature::flag("corrupt", header.has(incompatible::CORRUPT), true));
        list.push(Feature::flag(names::EXTENDED_L2, header.has(incompatible::EXTENDED_L2), true));
    }
    if let Some(why) = data_file::refusal(header) {
        list.push(Feature::text(names::DATA_FILE_REFUSED, why, false));
    }
    match header.crypt_method {
        0 => {}
        1 => list.push(Feature::text(names::ENCRYPTION, "aes", false)),
        2 => list.push(Feature::text(names::ENCRYPTION, "luks", false)),
        other => list.push(Feature::text(names::ENCRYPTION, &format!("unknown method {other}"), false)),
    }
    list.push(Feature::number(names::SNAPSHOTS, u64::from(header.snapshots), false));
    // Without the autoclear bit the extension is stale, but somebody still has bitmaps in there.
    let bitmaps = match header.extension(ExtensionKind::Bitmaps) {
        None => 0,
        Some(_) => header.bitmaps().map_or(1, |bitmaps| u64::from(bitmaps.count)),
    };
    list.push(Feature::number(names::BITMAPS, bitmaps, false));
    let unknown = unknown_features(header);
    if !unknown.is_empty() {
        list.push(Feature::text(names::UNKNOWN_FEATURES, &unknown.join(", "), false));
    }
    list
}

/// The incompatible feature bits that nothing is known of, each with the name that the image gives to it.
fn unknown_features(header: &Header) -> Vec<String> {
    let unknown = header.incompatible & !incompatible::KNOWN;
    (0..64u8)
        .filter(|bit| unknown & (1 << bit) != 0)
        .map(|bit| match header.feature_name(0, bit) {
            Some(name) if !name.is_empty() => {
                let name = String::from_utf8_lossy(&name);
                let name: String = name.chars().take(NAME_CHARS).flat_map(char::escape_default).collect();
                format!("bit {bit} (\"{name}\")")
            }
            _ => format!("bit {bit}"),
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_guest_sdk::random::Random;
    use instar_plugin_api::{Context, Incoming, Role};
    use instar_qcow2_format::{create, CreateOptions};

    fn new_image() -> Vec<u8> {
        let mut options = CreateOptions::new(1 << 30);
        options.backing_name = Some(b"base".to_vec());
        options.backing_format = Some(b"qcow2".to_vec());
        create(&options).unwrap().metadata
    }

    fn context(facts: &ImageFacts) -> Context<'_> {
        Context::writing(Some(facts), Incoming::from_layers([facts]).unwrap())
    }

    fn read_bytes(bytes: &Vec<u8>) -> Result<ImageFacts, PluginError> {
        read(&ImageReader::new(bytes.len() as u64, bytes))
    }

    #[test]
    fn the_facts_of_a_new_image() {
        let facts = read_bytes(&new_image()).unwrap();
        assert_eq!((facts.virtual_size, facts.cluster_size), (1 << 30, 65536));
        let backing = facts.backing.as_ref().unwrap();
        assert_eq!(backing.name.as_slice(), b"base");
        assert_eq!(backing.format.as_ref().unwrap().as_slice(), b"qcow2");
        assert!(!facts.dirty && !facts.corrupt && !facts.encrypted);
        assert_eq!(facts.text("compat"), Some("1.1"));
        assert_eq!(facts.number("snapshots"), Some(0));
    }

    #[test]
    fn feature_bits_become_facts_and_refusals() {
        for (bit, name) in [(1, "corrupt"), (2, "data file"), (20, "bit 20"), (63, "bit 63")] {
            let mut bytes = new_image();
            let field = u64::from_be_bytes(bytes[72..80].try_into().unwrap()) | 1 << bit;
            bytes[72..80].copy_from_slice(&field.to_be_bytes());
            let facts = read_bytes(&bytes).unwrap();
            let verdict = crate::verdict::give(Role::Empty, &facts, &context(&facts));
            assert!(verdict.code != 0 && verdict.reason.contains(name), "{bit}: {}", verdict.reason);
        }
        // The dirty bit is a fact, and no reason to refuse.
        let mut bytes = new_image();
        bytes[79] |= 1;
        let facts = read_bytes(&bytes).unwrap();
        assert!(facts.dirty);
        assert_eq!(crate::verdict::give(Role::Empty, &facts, &context(&facts)).code, 0);
        // With extended L2 entries, the same disk needs an L1 table twice as long.
        let mut bytes = new_image();
        bytes[79] |= 16;
        assert!(read_bytes(&bytes).unwrap_err().message.contains("l1_size"));
        // The image's own name of a bit is shown, without what it could do to a terminal.
        let mut bytes = new_image();
        bytes[72] = 0x80;
        let table = bytes.windows(9).position(|w| w == b"dirty bit").unwrap();
        bytes[table - 1] = 63;
        bytes[table..table + 9].copy_from_slice(b"\x1b[2Jodd\n\"");
        let facts = read_bytes(&bytes).unwrap();
        let reason = crate::verdict::give(Role::Empty, &facts, &context(&facts)).reason;
        assert!(reason.contains("bit 63") && reason.contains("odd") && !reason.contains('\x1b'), "{reason}");
    }

    #[test]
    fn no_header_makes_it_panic() {
        let good = new_image();
        let mut random = Random::seeded(1);
        for _ in 0..20_000 {
            let mut bytes = good[..1024].to_vec();
            for _ in 0..=random.below(4) {
                bytes[4 + random.index(600)] = random.byte();
            }
            bytes.truncate(random.index(1200));
            if let Ok(facts) = read_bytes(&bytes) {
                for role in [Role::Read, Role::Write, Role::Empty, Role::Below] {
                    let _ = crate::verdict::give(role, &facts, &context(&facts));
                }
            }
        }
    }
}
