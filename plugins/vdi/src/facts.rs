//! What the header says, as facts and features.

use instar_plugin_api::std_types::ROption;
use instar_plugin_api::{
    BackingPointer, ErrorCode, Feature, ImageFacts, ImageReader, PluginError, PROBE_CERTAIN, PROBE_NO,
};
use instar_vdi_format::{Header, ImageType, Trouble, Uuid, HEADER_BYTES, SIGNATURE, SIGNATURE_OFFSET, UUID_BYTES};

/// Names of the features.
pub mod names {
    /// The kind of image, a word.
    pub const TYPE: &str = "image-type";
    /// Which image it is, a UUID as a text: the name of a parent's file in VirtualBox's folder of snapshots.
    pub const UUID: &str = "uuid";
    /// Which content it has, a UUID as a text.
    pub const MODIFY: &str = "modification-uuid";
    /// The parent's `uuid`; absent without a parent.
    pub const PARENT: &str = "parent-uuid";
    /// The parent's `modification-uuid`; absent without a parent.
    pub const PARENT_MODIFY: &str = "parent-modification-uuid";
    /// What somebody wrote about the image, a text; absent if it is empty.
    pub const COMMENT: &str = "comment";
    /// Slots that are in use, as the header says: a number.
    pub const ALLOCATED: &str = "allocated-blocks";
    /// All blocks are there: true or absent.
    pub const STATIC: &str = "static";
    /// Where the first block begins in the file, in bytes: what a verdict counts with.
    pub const DATA_OFFSET: &str = "data-offset";
    /// Why the image cannot be worked with, a clause; absent if nothing stands in the way.
    pub const UNSUPPORTED: &str = "unsupported";
    /// Why nothing can be written into it, a clause; absent if it can.
    pub const READ_ONLY: &str = "read-only";
}

/// See [`FormatPlugin::probe`](instar_plugin_api::FormatPlugin::probe).
pub fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
    let start = image.read_vec(SIGNATURE_OFFSET as u64, SIGNATURE.len())?;
    Ok(if start == SIGNATURE { PROBE_CERTAIN } else { PROBE_NO })
}

/// The name that VirtualBox gives to the file of a snapshot (`Machine::i_createImplicitDiffs`): the only one that an image
/// says anything about, by the parent's UUID. The base of a machine has another one, and is found by its identity.
fn name_of(uuid: Uuid) -> Vec<u8> {
    format!("{{{uuid}}}.vdi").into_bytes()
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
    let facts = ImageFacts::new("vdi", header.virtual_size(), header.block_size, image.length());
    let mut facts = facts.with_clusters_at_most(header.blocks.into());
    facts.identity = header.identity().to_vec().into();
    let text = |name, uuid: Uuid| Feature::text(name, &uuid.to_string(), true);
    facts.features.push(Feature::text(names::TYPE, header.image_type.name(), true));
    facts.features.push(Feature::number(names::ALLOCATED, header.allocated.into(), true));
    facts.features.push(text(names::UUID, header.create));
    facts.features.push(text(names::MODIFY, header.modify));
    if let Some(parent) = header.parent_identity() {
        facts.backing = ROption::RSome(BackingPointer::new(name_of(header.link), Some(b"vdi".to_vec())));
        facts.parent_identity = parent.to_vec().into();
        facts.parent_identity_unique = true;
        facts.parent_announced = header.parent_announced();
        facts.features.push(text(names::PARENT, header.link));
        facts.features.push(text(names::PARENT_MODIFY, header.parent_modify));
    }
    if !header.comment().is_empty() {
        facts.features.push(Feature::text(names::COMMENT, &String::from_utf8_lossy(header.comment()), true));
    }
    facts.features.push(Feature::number(names::DATA_OFFSET, header.data_offset, false));
    if header.image_type == ImageType::Static {
        facts.features.push(Feature::flag(names::STATIC, true, false));
    }
    for (name, why) in [(names::UNSUPPORTED, header.contradiction()), (names::READ_ONLY, header.why_not_written())] {
        facts.features.extend(why.map(|why| Feature::text(name, why, false)));
    }
    Ok(facts)
}

/// See [`FormatPlugin::next_identity`](instar_plugin_api::FormatPlugin::next_identity).
pub fn next_identity(own: &ImageFacts, child: &ImageFacts) -> Vec<u8> {
    let parts = own.identity.split_at_checked(UUID_BYTES);
    let parts = parts.and_then(|(create, modify)| Some((create, Uuid(modify.try_into().ok()?))));
    parts.map_or_else(Vec::new, |(create, modify)| [create, &modify.next(&child.identity).0].concat())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_vdi_format::{create, field, CreateOptions};

    fn header(parent: Option<(Uuid, Uuid)>, change: impl FnOnce(&mut Vec<u8>)) -> Result<ImageFacts, PluginError> {
        let (create_uuid, modify) = (Uuid([0x11; 16]), Uuid([0x12; 16]));
        let options = CreateOptions { virtual_size: 5 << 20, preallocated: false, create: create_uuid, modify, parent };
        let mut bytes = create(&options).unwrap().regions.remove(0).1;
        change(&mut bytes);
        read(&ImageReader::new(bytes.len() as u64, &bytes))
    }

    #[test]
    fn a_parent_is_looked_for_by_its_uuid_and_proven_by_both() {
        let base = header(None, |_| {}).unwrap();
        assert!(base.backing.is_none() && base.parent_identity.is_empty());
        assert_eq!(base.text(names::UUID), Some("11111111-1111-1111-1111-111111111111"));
        let child = header(Some((Uuid([0x11; 16]), Uuid([0x12; 16]))), |_| {}).unwrap();
        let next = next_identity(&base, &child);
        let modify = Uuid(next[16..].try_into().unwrap());
        assert!(next[..16] == [0x11; 16] && modify == Uuid([0x12; 16]).next(&child.identity));
        let pointer = child.backing.clone().into_option().unwrap();
        assert_eq!(pointer.name.as_slice(), b"{11111111-1111-1111-1111-111111111111}.vdi");
        assert!(child.is_proven_child_of(&base, &next) && child.follows(&next));
        let stale = header(Some((Uuid([0x11; 16]), Uuid([0x13; 16]))), |_| {}).unwrap();
        assert!(!stale.goes_with(&base, &next));
        for (mark, fits) in [(0, false), (0x80, true)] {
            let announced = header(Some((Uuid([0x11; 16]), modify)), |bytes| bytes[field::UNUSED + 3] = mark).unwrap();
            assert_eq!((announced.parent_announced, announced.goes_with(&base, &next)), (fits, fits));
        }
    }

    #[test]
    fn what_is_odd_is_a_feature() {
        let facts = header(None, |bytes| bytes[field::BLOCK_EXTRA + 1] = 2).unwrap();
        assert!(facts.text(names::READ_ONLY).unwrap().contains("cbBlockExtra"));
        let facts = header(None, |bytes| bytes[field::TYPE] = 4).unwrap();
        assert!(facts.text(names::UNSUPPORTED).unwrap().contains("uuidLinkage is null"));
        let facts = header(None, |bytes| bytes[field::COMMENT..field::COMMENT + 3].copy_from_slice(b"a\x1bb")).unwrap();
        assert_eq!(facts.text(names::COMMENT), Some("a\x1bb"));
        assert_eq!(header(None, |bytes| bytes[68] = 9).unwrap_err().code, ErrorCode::UnsupportedFormat.number());
        assert_eq!(header(None, |bytes| bytes.truncate(511)).unwrap_err().code, ErrorCode::ParseFailed.number());
    }
}
