//! What header and descriptor say, as facts and features.

use crate::encoding::recorded_parent;
use crate::extents::{file_of, Survey};
use crate::refusal::refused;
use instar_plugin_api::std_types::ROption;
use instar_plugin_api::{
    BackingPointer, ErrorCode, Feature, ImageFacts, ImageFile, ImageReader, PluginError, PROBE_CERTAIN, PROBE_LIKELY,
    PROBE_NO,
};
use instar_vmdk_format::{
    next_content_id, Descriptor, Header, Trouble, COWD_MAGIC, FOOTER_BYTES, HEADER_BYTES, MAGIC, MAX_DESCRIPTOR_BYTES,
    NO_PARENT, SECTOR, SESPARSE_MAGIC,
};

/// Names of the features. Those of the first three are QEMU's, for `instar info`.
pub mod names {
    /// The content ID, a number.
    pub const CID: &str = "cid";
    /// The content ID that is recorded of the parent, a number; 4294967295 without one.
    pub const PARENT_CID: &str = "parent-cid";
    /// The kind of image.
    pub const CREATE_TYPE: &str = "create-type";
    /// Grains are compressed: true or absent.
    pub const COMPRESSED: &str = "compressed";
    /// A footer says where the grain directory is, so that the image can be read as a stream: true or absent.
    pub const STREAM: &str = "stream";
    /// Extents are plain bytes: true or absent.
    pub const FLAT: &str = "flat";
    /// An extent is a sparse one of ESX (COWD): true or absent.
    pub const COWD: &str = "cowd";
    /// By how much the first free sectors of such extents lie behind the ends of their files, in bytes; absent for 0.
    pub const COWD_BEYOND: &str = "cowd-beyond";
    /// An extent is a seSparse one, which is only read: true or absent.
    pub const SESPARSE: &str = "sesparse";
    /// VMware tracks changed blocks in another file: true or absent.
    pub const CHANGE_TRACKING: &str = "change-tracking";
    /// Why the image cannot be worked with, a sentence; absent if nothing stands in the way.
    pub const UNSUPPORTED: &str = "unsupported";
}

/// How much of a text is looked at to see whether it is a descriptor: more than any comment in front of it.
const TEXT: usize = 4096;

/// See [`FormatPlugin::probe`](instar_plugin_api::FormatPlugin::probe).
pub fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
    let start = image.read_vec(0, TEXT)?;
    Ok(match () {
        () if start.starts_with(&MAGIC) || is_delta(&start) => PROBE_CERTAIN,
        () if is_descriptor(&start) => PROBE_LIKELY,
        () => PROBE_NO,
    })
}

/// Whether a file begins as the extent of a delta disk does, which has no descriptor in it.
fn is_delta(start: &[u8]) -> bool {
    start.starts_with(&COWD_MAGIC) || start.starts_with(&SESPARSE_MAGIC)
}

/// A text whose first line that is neither blank nor a comment gives the version, as QEMU looks for it.
fn is_descriptor(start: &[u8]) -> bool {
    let mut lines = start.split(|&b| b == b'\n').map(<[u8]>::trim_ascii);
    lines
        .find(|line| !line.is_empty() && !line.starts_with(b"#"))
        .is_some_and(|line| matches!(line, b"version=1" | b"version=2" | b"version=3"))
}

fn unsupported(text: &str) -> PluginError {
    PluginError::new(ErrorCode::UnsupportedFormat, text)
}

/// See [`FormatPlugin::facts`](instar_plugin_api::FormatPlugin::facts).
pub fn read(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
    let start = image.read_vec(0, HEADER_BYTES)?;
    if is_delta(&start) {
        return Err(unsupported(NO_DESCRIPTOR));
    }
    if !start.starts_with(&MAGIC) {
        return of_descriptor_file(image);
    }
    let mut bytes = [0; HEADER_BYTES];
    image.read_exact_at(0, &mut bytes)?;
    let mut header = Header::parse(&bytes).map_err(refused)?;
    let stream = header.directory_is_at_the_end();
    if stream {
        let mut bytes = [0; FOOTER_BYTES];
        image.read_exact_at(image.length().saturating_sub(FOOTER_BYTES as u64), &mut bytes)?;
        header = header.with_footer(&bytes).map_err(refused)?;
    }
    let descriptor_at = (header.descriptor_offset, header.descriptor_size);
    if descriptor_at.0 == 0 || descriptor_at.1 == 0 {
        return Err(unsupported(NO_DESCRIPTOR));
    }
    let descriptor = descriptor(image, descriptor_at)?;
    let facts = ImageFacts::new("vmdk", header.virtual_size(), header.grain_bytes(), image.length());
    // Entries of 4 bytes. In several files, grains need not begin at multiples of their size, and may differ in it: there, it
    // is all of the disk.
    let mut facts = facts.with_clusters_at_most(image.length() / 4);
    describe(&mut facts, &descriptor)?;
    if header.has(instar_vmdk_format::flags::COMPRESSED) {
        facts.compresses = true;
        facts.features.push(Feature::flag(names::COMPRESSED, true, false));
    }
    if stream {
        facts.features.push(Feature::flag(names::STREAM, true, false));
    }
    if !descriptor.is_one_file() {
        let reason = match descriptor.disk_extents() {
            Err(error) => error.text,
            Ok(_) => "the descriptor in a sparse extent names other extents, which is not supported".into(),
        };
        facts.features.push(Feature::text(names::UNSUPPORTED, &reason, false));
    }
    Ok(facts)
}

/// Why a sparse extent alone is no image.
const NO_DESCRIPTOR: &str =
    "the file has no descriptor: it is an extent of an image in several files, whose descriptor has to be named";

/// The embedded descriptor, whose place and size are given in sectors.
fn descriptor(image: &ImageReader<'_>, (offset, size): (u64, u64)) -> Result<Descriptor, PluginError> {
    let place = offset.checked_mul(SECTOR).zip(size.checked_mul(SECTOR));
    let place = place.filter(|&(_, size)| size <= MAX_DESCRIPTOR_BYTES);
    let Some((offset, size)) = place else {
        let text = format!("a descriptor of {size} sectors at sector {offset} is not supported");
        return Err(PluginError::new(ErrorCode::ParseFailed, text));
    };
    let mut text = vec![0; usize::try_from(size).unwrap_or(0)];
    image.read_exact_at(offset, &mut text)?;
    if text.iter().all(|&byte| byte == 0) {
        // So QEMU makes the extents of an image in several files.
        return Err(unsupported(NO_DESCRIPTOR));
    }
    Descriptor::parse(&text).map_err(refused)
}

/// The descriptor that is a file of its own.
fn descriptor_file(image: &ImageReader<'_>) -> Result<Descriptor, PluginError> {
    if image.length() > MAX_DESCRIPTOR_BYTES {
        let text = format!("a descriptor of {} bytes is longer than any", image.length());
        return Err(PluginError::new(ErrorCode::ParseFailed, text));
    }
    let text = image.read_vec(0, usize::try_from(image.length()).unwrap_or(0))?;
    Descriptor::parse(&text).map_err(refused)
}

/// See [`FormatPlugin::files`](instar_plugin_api::FormatPlugin::files): those of the extents, in the descriptor's order.
pub fn files(image: &ImageReader<'_>) -> Result<Vec<ImageFile>, PluginError> {
    let start = image.read_vec(0, SESPARSE_MAGIC.len())?;
    if start.starts_with(&MAGIC) || is_delta(&start) {
        return Ok(Vec::new());
    }
    let descriptor = descriptor_file(image)?;
    match descriptor.disk_extents() {
        Ok(extents) => extents.into_iter().map(|extent| file_of(&descriptor, &extent)).collect(),
        // That is a fact, for the verdict to refuse.
        Err(error) if error.trouble == Trouble::Unsupported => Ok(Vec::new()),
        Err(error) => Err(refused(error)),
    }
}

/// A disk in several files, named by the one with the descriptor.
fn of_descriptor_file(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
    let descriptor = descriptor_file(image)?;
    let (extents, unsupported) = match descriptor.disk_extents() {
        Ok(extents) => (extents, None),
        Err(error) if error.trouble == Trouble::Unsupported => (Vec::new(), Some(error.text)),
        Err(error) => return Err(refused(error)),
    };
    let sectors = descriptor.extents.iter().try_fold(0u64, |sum, line| sum.checked_add(line.sectors));
    let size = sectors.and_then(|sectors| sectors.checked_mul(SECTOR)).filter(|&size| size <= i64::MAX as u64);
    let size = size.ok_or_else(|| {
        PluginError::new(ErrorCode::ParseFailed, "the extents of the descriptor are larger than any disk")
    })?;
    let survey = Survey::of(image, &extents)?;
    // A crash while the disk was about to grow has left that: it has not, yet.
    let size = size.saturating_sub(survey.missing);
    let mut facts = ImageFacts::new("vmdk", size, survey.grain, image.length().saturating_add(survey.length));
    describe(&mut facts, &descriptor)?;
    let flags = [(names::FLAT, survey.flat), (names::COWD, survey.cowd), (names::SESPARSE, survey.sesparse)];
    facts.features.extend(flags.into_iter().filter(|(_, set)| *set).map(|(name, _)| Feature::flag(name, true, false)));
    if survey.beyond > 0 {
        facts.features.push(Feature::number(names::COWD_BEYOND, survey.beyond, false));
    }
    let unsupported = unsupported.or(survey.unsupported);
    facts.features.extend(unsupported.map(|text| Feature::text(names::UNSUPPORTED, &text, false)));
    Ok(facts)
}

/// What the descriptor says.
fn describe(facts: &mut ImageFacts, descriptor: &Descriptor) -> Result<(), PluginError> {
    facts.encrypted = descriptor.encrypted;
    let parent = descriptor.parent();
    if let (Some(_), Some(name)) = (parent, &descriptor.parent_hint) {
        // A parent is a vmdk, too: content IDs are all that is recorded of it.
        let format = ROption::RSome(b"vmdk".to_vec().into());
        let (name, other_names) = recorded_parent(descriptor, name)?;
        facts.backing = ROption::RSome(BackingPointer { name, other_names, format });
    }
    let (id, parent_id) = (descriptor.content_id.value, parent.unwrap_or(NO_PARENT));
    facts.identity = id.to_be_bytes().to_vec().into();
    if let Some(parent) = &descriptor.parent_id.as_ref().filter(|_| facts.backing.is_some()) {
        facts.parent_identity = parent.value.to_be_bytes().to_vec().into();
        facts.parent_announced = parent.marked;
    }
    let kind = String::from_utf8_lossy(&descriptor.create_type);
    facts.features.extend([
        Feature::number(names::CID, id.into(), true),
        Feature::number(names::PARENT_CID, parent_id.into(), true),
        Feature::text(names::CREATE_TYPE, &kind, true),
    ]);
    if descriptor.change_tracking {
        facts.features.push(Feature::flag(names::CHANGE_TRACKING, true, false));
    }
    if let (Some(id), None) = (parent, &descriptor.parent_hint) {
        // It would read as zeroes where its parent shows.
        let text =
            format!("parentCID {id:08x} says that there is a parent, and no parentFileNameHint which one: add it");
        facts.features.push(Feature::text(names::UNSUPPORTED, &text, false));
    }
    Ok(())
}

/// See [`FormatPlugin::next_identity`](instar_plugin_api::FormatPlugin::next_identity).
pub fn next_identity(own: &ImageFacts, child: &ImageFacts) -> Vec<u8> {
    let id = |facts: &ImageFacts| facts.identity.as_slice().try_into().ok().map(u32::from_be_bytes);
    id(own).map_or_else(Vec::new, |own| next_content_id(own, id(child)).to_be_bytes().to_vec())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn facts(lines: &str) -> Result<ImageFacts, PluginError> {
        let text = format!("version=1\ncreateType=\"monolithicFlat\"\nCID=1234abcd\nRW 2 FLAT \"f\" 0\n{lines}");
        let text = text.into_bytes();
        read(&ImageReader::new(text.len() as u64, &text))
    }

    #[test]
    fn identities_are_those_of_the_descriptor() {
        let base = facts("").unwrap();
        assert_eq!(base.identity.as_slice(), 0x1234_abcd_u32.to_be_bytes());
        let next = next_content_id(0x1234_abcd, Some(0x1234_abcd));
        assert_eq!(next_identity(&base, &base), next.to_be_bytes());
        assert!(base.parent_identity.is_empty() && base.backing.is_none());
        for (digits, fits) in [("1234ABCD".to_owned(), true), (format!("{next:08x}"), false), ("5".into(), false)] {
            let child = facts(&format!("parentCID={digits}\nparentFileNameHint=\"b\"\n")).unwrap();
            assert_eq!(
                (child.goes_with(&base, &next.to_be_bytes()), child.parent_announced),
                (fits, false),
                "{digits}"
            );
        }
        let digits = format!("{next:08x}");
        let marked = format!("{}{}", digits[..1].to_uppercase(), &digits[1..]);
        let child = facts(&format!("parentCID={marked}\nparentFileNameHint=\"b\"\n")).unwrap();
        assert!(
            child.goes_with(&base, &next.to_be_bytes()) && child.parent_announced && child.follows(&next.to_be_bytes())
        );
    }

    #[test]
    fn contradictions_and_names_without_bound() {
        let reason = facts("parentCID=7\n").unwrap();
        assert!(reason.text(names::UNSUPPORTED).unwrap().contains("parentFileNameHint"));
        let none = facts("parentCID=ffffffff\nparentFileNameHint=\"b\"\n").unwrap();
        assert!(none.backing.is_none() && none.feature(names::UNSUPPORTED).is_none());
        let hint = |length: usize| facts(&format!("parentCID=7\nparentFileNameHint=\"{}\"\n", "a".repeat(length)));
        assert!(hint(4095).unwrap().backing.is_some());
        assert!(hint(4096).unwrap_err().message.contains("4096 bytes"));
        // Each of these takes three bytes in UTF-8, and would be too long: as it is it is not.
        let gbk =
            [b"encoding=\"GBK\"\nparentCID=7\nparentFileNameHint=\"".as_slice(), &[0xc3, 0xa8].repeat(2000), b"\"\n"];
        let text = [b"version=1\ncreateType=\"monolithicFlat\"\nCID=1\nRW 2 FLAT \"f\" 0\n".as_slice(), &gbk.concat()]
            .concat();
        let facts = read(&ImageReader::new(text.len() as u64, &text)).unwrap();
        let backing = facts.backing.into_option().unwrap();
        assert_eq!((backing.name.len(), backing.other_names.len()), (4000, 0));
    }
}
