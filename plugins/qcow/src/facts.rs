//! What the header says, as facts and features.

use instar_plugin_api::std_types::ROption;
use instar_plugin_api::{
    BackingPointer, ErrorCode, Feature, ImageFacts, ImageReader, PluginError, PROBE_CERTAIN, PROBE_NO,
};
use instar_qcow_format::{Header, Trouble, ENTRY_BYTES, HEADER_BYTES, MAGIC};

/// Names of the features.
pub mod names {
    /// Bytes of an L2 table, a number: what a verdict counts with.
    pub const TABLE: &str = "l2-table-size";
}

/// See [`FormatPlugin::probe`](instar_plugin_api::FormatPlugin::probe). Magic number and version, as in `qcow_probe`.
pub fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
    let start = image.read_vec(0, HEADER_BYTES)?;
    Ok(if start.len() == HEADER_BYTES && start.starts_with(&MAGIC) { PROBE_CERTAIN } else { PROBE_NO })
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
    let facts = ImageFacts::new("qcow", header.virtual_size(), header.cluster_size(), image.length());
    let mut facts = facts.with_clusters_at_most(image.length() / ENTRY_BYTES);
    facts.encrypted = header.encrypted;
    if let Some((offset, length)) = header.backing {
        let mut name = vec![0; length];
        image.read_exact_at(offset, &mut name)?;
        facts.backing = ROption::RSome(BackingPointer::new(name, None));
    }
    facts.features.push(Feature::number(names::TABLE, header.table_bytes(), true));
    Ok(facts)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_qcow_format::{create, field, CreateOptions};

    fn facts(backing: Option<&[u8]>, change: impl FnOnce(&mut Vec<u8>)) -> Result<ImageFacts, PluginError> {
        let made = create(&CreateOptions { virtual_size: 5 << 20, backing: backing.map(<[u8]>::to_vec) }).unwrap();
        let mut bytes = made.start;
        bytes.resize(usize::try_from(made.length).unwrap(), 0);
        change(&mut bytes);
        read(&ImageReader::new(bytes.len() as u64, &bytes))
    }

    #[test]
    fn a_name_has_no_format() {
        let base = facts(None, |_| {}).unwrap();
        assert!(base.backing.is_none() && !base.encrypted && base.identity.is_empty());
        assert_eq!((base.virtual_size, base.cluster_size, base.number(names::TABLE)), (5 << 20, 4096, Some(4096)));
        let child = facts(Some(b"base.img"), |_| {}).unwrap();
        let pointer = child.backing.clone().into_option().unwrap();
        assert_eq!((pointer.name.as_slice(), pointer.format.is_none()), (&b"base.img"[..], true));
        assert_eq!((child.cluster_size, child.max_allocated_clusters), (512, child.file_length / 8));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(facts(None, |bytes| bytes[field::CRYPT + 3] = 1).unwrap().encrypted);
        assert!(facts(None, |bytes| bytes[field::L2_BITS] = 3).unwrap_err().message.contains("l2_bits"));
        let cut = |bytes: &mut Vec<u8>| bytes.truncate(52);
        assert_eq!(facts(Some(b"base.img"), cut).unwrap_err().code, ErrorCode::ParseFailed.number());
    }

    #[test]
    fn a_file_is_told_by_its_start() {
        let ask = |bytes: &[u8]| probe(&ImageReader::new(bytes.len() as u64, &bytes.to_vec())).unwrap();
        let image = create(&CreateOptions { virtual_size: 512, backing: None }).unwrap().start;
        assert_eq!((ask(&image), ask(&image[..47])), (PROBE_CERTAIN, PROBE_NO));
        assert_eq!(ask(&[&b"QFI\xfb\0\0\0\x03"[..], &image[8..]].concat()), PROBE_NO);
    }
}
