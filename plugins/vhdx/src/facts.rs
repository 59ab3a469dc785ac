//! What headers and metadata say, as facts and features: all of it seen through the log.

use crate::parent;
use instar_plugin_api::std_types::ROption;
use instar_plugin_api::{ErrorCode, Feature, ImageFacts, ImageReader, PluginError, PROBE_CERTAIN, PROBE_NO};
use instar_vhdx_format::{Guid, LoadError, Opened, Record, Trouble, SIGNATURE};

/// Names of the features.
pub mod names {
    /// fixed, dynamic or differencing.
    pub const KIND: &str = "disk-type";
    /// Bytes of a payload block, a number.
    pub const BLOCK: &str = "block-size";
    /// Bytes of a logical sector, a number.
    pub const LOGICAL: &str = "logical-sector-size";
    /// Bytes of a physical sector, a number.
    pub const PHYSICAL: &str = "physical-sector-size";
    /// Which content it has, a GUID as a text: children record it.
    pub const DATA_WRITE: &str = "data-write-guid";
    /// Which disk it is, a GUID as a text; a child has its parent's.
    pub const DISK_ID: &str = "virtual-disk-id";
    /// `parent_linkage`, a GUID as a text; absent without a parent.
    pub const LINKAGE: &str = "parent-linkage";
    /// The parent's path as it is recorded; absent without one.
    pub const PARENT_PATH: &str = "parent-path";
    /// How long the file is once the log is replayed, a number of bytes.
    pub const LENGTH: &str = "replayed-length";
    /// The parent's change cannot be recorded in the locator: true or absent.
    pub const BY_HEADER: &str = "announced-by-header";
    /// An item of metadata that belongs to the disk, a GUID as a text; absent if all are known.
    pub const FOREIGN: &str = "foreign-metadata";
    /// A copy of header or region table is damaged: which, a text; absent if they are whole.
    pub const DAMAGED: &str = "damaged-copy";
}

/// See [`FormatPlugin::probe`](instar_plugin_api::FormatPlugin::probe).
pub fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
    Ok(if image.read_vec(0, SIGNATURE.len())? == SIGNATURE { PROBE_CERTAIN } else { PROBE_NO })
}

fn open(image: &ImageReader<'_>) -> Result<Opened, PluginError> {
    let read = &mut |offset: u64, bytes: &mut [u8]| {
        bytes.fill(0);
        image.read_at(offset, bytes).map(|_| ())
    };
    Opened::load(image.length(), read).map_err(|error| match error {
        LoadError::Read(error) => error,
        LoadError::Format(error) => {
            let code = match error.trouble {
                Trouble::Unsupported => ErrorCode::UnsupportedFormat,
                Trouble::Corrupt => ErrorCode::ParseFailed,
            };
            PluginError::new(code, error.text)
        }
    })
}

/// See [`FormatPlugin::facts`](instar_plugin_api::FormatPlugin::facts).
pub fn read(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
    let opened = open(image)?;
    let (header, metadata) = (&opened.headers.current, &opened.metadata);
    let facts = ImageFacts::new("vhdx", metadata.size, metadata.block_size, image.length());
    // The last one may be cut, and each block that is zeroes takes no room: only the disk bounds those.
    let mut facts = facts.with_clusters_at_most(u64::MAX);
    facts.identity = header.data_write.0.to_vec().into();
    facts.dirty = header.is_dirty();
    let kind = match (metadata.has_parent, metadata.leave_allocated) {
        (true, _) => "differencing",
        (false, true) => "fixed",
        (false, false) => "dynamic",
    };
    let mut features = vec![
        Feature::text(names::KIND, kind, true),
        Feature::number(names::BLOCK, metadata.block_size, true),
        Feature::number(names::LOGICAL, metadata.logical_sector, true),
        Feature::number(names::PHYSICAL, metadata.physical_sector, true),
        Feature::text(names::DATA_WRITE, &header.data_write.to_string(), true),
        Feature::text(names::DISK_ID, &metadata.disk_id.to_string(), true),
        Feature::number(names::LENGTH, opened.file_length, false),
    ];
    if let (Some(locator), Some(lineage)) = (&opened.locator, opened.lineage()) {
        let (pointer, path) = parent::pointer(locator);
        facts.backing = ROption::RSome(pointer);
        facts.parent_identity = lineage.parent().0.to_vec().into();
        facts.parent_identity_unique = true;
        facts.parent_announced = lineage.announced.is_some();
        features.push(Feature::text(names::LINKAGE, &lineage.linkage.to_string(), true));
        features.extend(path.map(|path| Feature::text(names::PARENT_PATH, &path, true)));
        if lineage.record == Record::Header {
            features.push(Feature::flag(names::BY_HEADER, true, false));
        }
    }
    features.extend(metadata.foreign.map(|id| Feature::text(names::FOREIGN, &id.to_string(), false)));
    let damaged = match (opened.headers.both, opened.regions.both) {
        (true, true) => None,
        (false, true) => Some("its two headers"),
        (true, false) => Some("its two region tables"),
        (false, false) => Some("its two headers, and of its two region tables"),
    };
    features.extend(damaged.map(|which| Feature::text(names::DAMAGED, which, false)));
    facts.features = features.into();
    Ok(facts)
}

/// See [`FormatPlugin::next_identity`](instar_plugin_api::FormatPlugin::next_identity).
pub fn next_identity(own: &ImageFacts, child: &ImageFacts) -> Vec<u8> {
    let own: Option<[u8; 16]> = own.identity.as_slice().try_into().ok();
    own.map_or_else(Vec::new, |own| Guid(own).next(&child.identity).0.to_vec())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_vhdx_format::{create, CreateOptions, Guid, Parent};

    fn image(parent: Option<&str>, fixed: bool) -> Vec<u8> {
        let parent = parent.map(|path| Parent { data_write: Guid([9; 16]), path: path.into() });
        let options = CreateOptions {
            virtual_size: 3 << 20,
            block_size: 1 << 20,
            logical_sector: 512,
            physical_sector: 4096,
            fixed,
            file_write: Guid([1; 16]),
            data_write: Guid([2; 16]),
            disk_id: Guid([3; 16]),
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
        for (bytes, kind) in [
            (image(None, false), "dynamic"),
            (image(None, true), "fixed"),
            (image(Some("sub/base.vhdx"), false), "differencing"),
        ] {
            assert_eq!(probe(&reader(&bytes)), Ok(PROBE_CERTAIN));
            let facts = read(&reader(&bytes)).unwrap();
            assert_eq!((facts.virtual_size, facts.text(names::KIND)), (3 << 20, Some(kind)));
            assert_eq!(facts.identity.as_slice(), [2; 16]);
            assert!(!facts.dirty && facts.feature(names::DAMAGED).is_none());
            assert_eq!(facts.backing.is_some(), kind == "differencing");
            if let Some(backing) = facts.backing.as_ref().into_option() {
                let names: Vec<_> = backing.names().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
                assert_eq!(names, ["sub/base.vhdx", "base.vhdx"]);
                assert!(facts.parent_identity.as_slice() == [9; 16] && facts.parent_identity_unique);
                assert!(!facts.parent_announced && facts.feature(names::BY_HEADER).is_none());
            }
        }
        assert_eq!(probe(&reader(&vec![0; 100])), Ok(PROBE_NO));
        assert_eq!(probe(&reader(&vec![])), Ok(PROBE_NO));
    }

    #[test]
    fn a_damaged_copy_is_told() {
        let mut bytes = image(None, false);
        bytes[64 << 10] = 0;
        assert_eq!(read(&reader(&bytes)).unwrap().text(names::DAMAGED), Some("its two headers"));
        bytes[256 << 10] = 0;
        assert!(read(&reader(&bytes)).unwrap().text(names::DAMAGED).unwrap().contains("region"));
        bytes[128 << 10] = 0;
        assert_eq!(read(&reader(&bytes)).unwrap_err().code, ErrorCode::ParseFailed.number());
        bytes.truncate(1000);
        assert_eq!(read(&reader(&bytes)).unwrap_err().code, ErrorCode::ParseFailed.number());
    }
}
