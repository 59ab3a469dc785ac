//! What footers and header say, as facts and features.

use crate::parent;
use instar_plugin_api::std_types::ROption;
use instar_plugin_api::{
    ErrorCode, Feature, ImageFacts, ImageReader, PluginError, PROBE_CERTAIN, PROBE_LIKELY, PROBE_NO,
};
use instar_vhd_format::{
    creators, BatmapHeader, Footer, Footers, FormatError, Header, Kind, Trouble, BATMAP_HEADER_BYTES, COOKIE,
    FOOTER_BYTES, HEADER_BYTES, SECTOR,
};

/// Names of the features.
pub mod names {
    /// fixed, dynamic or differencing.
    pub const KIND: &str = "disk-type";
    /// The program that made the image, four characters.
    pub const CREATOR: &str = "creator";
    /// The unique ID in hexadecimal.
    pub const UNIQUE_ID: &str = "unique-id";
    /// The parent's unique ID in hexadecimal; absent without a parent.
    pub const PARENT_ID: &str = "parent-unique-id";
    /// The parent's name as it is recorded; absent without one.
    pub const PARENT_NAME: &str = "parent-name";
    /// "Current Size" in bytes, a number.
    pub const CURRENT_SIZE: &str = "current-size";
    /// The size of the disk is that of its geometry: true or absent.
    pub const BY_GEOMETRY: &str = "size-by-geometry";
    /// The machine was suspended: true or absent.
    pub const SAVED_STATE: &str = "saved-state";
    /// A copy of the footer is missing or different: which, a text; absent if they are whole.
    pub const FOOTERS: &str = "damaged-footer";
    /// Bytes that a block takes in the file, a number; absent of a fixed disk.
    pub const STRIDE: &str = "block-in-file";
    /// There is a batmap: true or absent.
    pub const BATMAP: &str = "batmap";
    /// Why the image cannot be worked with, a sentence; absent if nothing stands in the way.
    pub const UNSUPPORTED: &str = "unsupported";
}

/// The version of tapdisk whose sector bitmaps have their bits in another order (blktap, `old_test_bit`).
const OLD_TAPDISK: u32 = 1;

fn refused(error: FormatError) -> PluginError {
    let code = match error.trouble {
        Trouble::Unsupported => ErrorCode::UnsupportedFormat,
        Trouble::Corrupt => ErrorCode::ParseFailed,
    };
    PluginError::new(code, error.text)
}

fn corrupt(text: impl Into<String>) -> PluginError {
    PluginError::new(ErrorCode::ParseFailed, text)
}

/// See [`FormatPlugin::probe`](instar_plugin_api::FormatPlugin::probe). Only a mark in front is certain: the last sector of a
/// raw disk is its guest's, who may write a footer there.
pub fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
    if image.read_vec(0, COOKIE.len())? == COOKIE {
        return Ok(PROBE_CERTAIN);
    }
    let Some(tail) = Footers::tail_offset(image.length()) else { return Ok(PROBE_NO) };
    let bytes = read_sector(image, tail)?;
    Ok(match Footer::parse(&bytes) {
        Ok(Some(footer)) if footer.kind() != Kind::Fixed || footer.virtual_size() <= tail => PROBE_LIKELY,
        _ => PROBE_NO,
    })
}

/// 512 bytes at byte `at`, fewer of them at the end of the file, where zeroes follow.
fn read_sector(image: &ImageReader<'_>, at: u64) -> Result<[u8; FOOTER_BYTES], PluginError> {
    let mut bytes = [0; FOOTER_BYTES];
    image.read_at(at, &mut bytes)?;
    Ok(bytes)
}

/// See [`FormatPlugin::facts`](instar_plugin_api::FormatPlugin::facts).
pub fn read(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
    let none = || corrupt("the file has no valid footer, neither at its end nor in front");
    let tail = Footers::tail_offset(image.length()).ok_or_else(none)?;
    let footers = Footers::choose(&read_sector(image, 0)?, &read_sector(image, tail)?, tail).map_err(refused)?;
    let footers = footers.ok_or_else(none)?;
    let footer = &footers.footer;
    let size = footer.virtual_size();
    let mut facts = if footer.kind() == Kind::Fixed {
        if size > tail {
            return Err(corrupt(format!("the file is too short for the {size} bytes of its disk")));
        }
        ImageFacts::new("vpc", size, 0, image.length())
    } else {
        of_blocks(image, footer)?
    };
    facts.identity = footer.unique_id().to_vec().into();
    let creator: String =
        footer.creator().iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte)).collect();
    let mut features = vec![
        Feature::text(names::KIND, footer.kind().name(), true),
        Feature::text(names::CREATOR, creator.trim_end(), true),
        Feature::text(names::UNIQUE_ID, &hexadecimal(&footer.unique_id()), true),
        Feature::number(names::CURRENT_SIZE, footer.current_size(), false),
    ];
    let flag = |features: &mut Vec<Feature>, name, on| {
        if on {
            features.push(Feature::flag(name, true, false));
        }
    };
    flag(&mut features, names::BY_GEOMETRY, footer.is_measured_by_geometry());
    flag(&mut features, names::SAVED_STATE, footer.has_saved_state());
    if !footers.are_whole() {
        let which = match footers.tail {
            Some(_) if !footers.head => "the copy in front is damaged",
            Some(_) => "the one at the end says another size, or another header, than its copy in front",
            None => "the one at the end is missing",
        };
        features.push(Feature::text(names::FOOTERS, which, false));
    }
    features.extend(std::mem::take(&mut facts.features));
    facts.features = features.into();
    Ok(facts)
}

/// The facts of a disk with blocks: its size, its parent, and what the header says.
fn of_blocks(image: &ImageReader<'_>, footer: &Footer) -> Result<ImageFacts, PluginError> {
    let mut bytes = [0; HEADER_BYTES];
    image.read_exact_at(footer.data_offset(), &mut bytes)?;
    let header = Header::parse(&bytes).map_err(refused)?;
    let (size, block) = (footer.virtual_size(), header.block_size());
    let (entries, blocks) = (u64::from(header.entries()), size.div_ceil(block));
    if entries < blocks {
        let text = format!("the block allocation table has {entries} entries, and the disk has {blocks} blocks");
        return Err(corrupt(text));
    }
    // The last one may be cut.
    let mut facts =
        ImageFacts::new("vpc", size, block, image.length()).with_clusters_at_most(image.length() / block + 1);
    facts.features.push(Feature::number(names::STRIDE, header.stride(), false));
    if footer.kind() == Kind::Differencing {
        let parent = parent::read(image, footer, &header)?;
        facts.backing = ROption::RSome(parent.pointer);
        facts.parent_identity_unique = !parent.identity.is_empty();
        facts.features.push(Feature::text(names::PARENT_ID, &hexadecimal(&header.parent_id()), true));
        facts.features.extend(parent.recorded.map(|name| Feature::text(names::PARENT_NAME, &name, true)));
        facts.parent_identity = parent.identity.into();
    }
    if footer.creator() == creators::XEN && footer.creator_version() == OLD_TAPDISK {
        let text = "tapdisk 0.1 made it, whose sector bitmaps are different: convert it with XenServer's vhd-update";
        facts.features.push(Feature::text(names::UNSUPPORTED, text, false));
    }
    let place = header.table_offset().saturating_add(header.table_bytes());
    if BatmapHeader::is_expected(footer) && place.saturating_add(BATMAP_HEADER_BYTES as u64) <= image.length() {
        if let Some(batmap) = BatmapHeader::parse(&read_sector(image, place)?) {
            facts.encrypted = batmap.is_encrypted();
            facts.features.push(Feature::flag(names::BATMAP, true, true));
        }
    }
    Ok(facts)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The current sizes of two images differ in a way that no vendor describes: the child would be larger than its parent.
pub fn is_larger(child: &ImageFacts, parent: &ImageFacts) -> bool {
    let size = |facts: &ImageFacts| facts.number(names::CURRENT_SIZE).map(|size| size / SECTOR);
    matches!((size(child), size(parent)), (Some(child), Some(parent)) if child > parent)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_vhd_format::{create, CreateOptions, Parent, DEFAULT_BLOCK};

    fn image(parent: Option<&str>, fixed: bool) -> Vec<u8> {
        let parent = parent.map(|path| Parent { id: [9; 16], path: path.into() });
        let options = CreateOptions {
            virtual_size: 1 << 20,
            unique_id: [7; 16],
            time: 0,
            fixed,
            block_size: DEFAULT_BLOCK,
            parent,
        };
        let image = create(&options).unwrap();
        let mut file = vec![0; usize::try_from(image.length).unwrap()];
        for (offset, bytes) in image.regions {
            let at = usize::try_from(offset).unwrap();
            file[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        file
    }

    fn reader(bytes: &Vec<u8>) -> ImageReader<'_> {
        ImageReader::new(bytes.len() as u64, bytes)
    }

    #[test]
    fn what_is_created_is_described() {
        for (bytes, kind, score) in [
            (image(None, false), "dynamic", PROBE_CERTAIN),
            (image(None, true), "fixed", PROBE_LIKELY),
            (image(Some("sub/base.vhd"), false), "differencing", PROBE_CERTAIN),
        ] {
            assert_eq!(probe(&reader(&bytes)), Ok(score));
            let facts = read(&reader(&bytes)).unwrap();
            assert_eq!((facts.virtual_size, facts.text(names::KIND)), (1 << 20, Some(kind)));
            assert_eq!(facts.identity.as_slice(), [7; 16]);
            assert_eq!(facts.backing.is_some(), kind == "differencing");
            assert!(facts.feature(names::FOOTERS).is_none());
            if let Some(backing) = facts.backing.as_ref().into_option() {
                let names: Vec<_> = backing.names().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
                assert_eq!(names, ["sub/base.vhd", "base.vhd"]);
                assert!(facts.parent_identity.as_slice() == [9; 16] && facts.parent_identity_unique);
                assert_eq!(backing.format.as_ref().into_option().unwrap().as_slice(), b"vpc");
            }
        }
    }

    #[test]
    fn a_lost_footer_is_told() {
        let mut bytes = image(None, false);
        let end = bytes.len() - 512;
        bytes[end] = 0;
        let facts = read(&reader(&bytes)).unwrap();
        assert!(facts.text(names::FOOTERS).unwrap().contains("missing"));
        bytes[end] = b'c';
        bytes[0] = 0;
        assert_eq!(probe(&reader(&bytes)), Ok(PROBE_LIKELY));
        assert!(read(&reader(&bytes)).unwrap().text(names::FOOTERS).unwrap().contains("in front"));
        bytes[end] = 0;
        assert_eq!(probe(&reader(&bytes)), Ok(PROBE_NO));
        assert!(read(&reader(&bytes)).is_err());
        assert_eq!(probe(&reader(&vec![0; 100])), Ok(PROBE_NO));
    }
}
