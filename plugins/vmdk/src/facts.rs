//! What header and descriptor say, as facts and features.

use instar_plugin_api::std_types::ROption;
use instar_plugin_api::{
    BackingPointer, ErrorCode, Feature, ImageFacts, ImageReader, PluginError, PROBE_CERTAIN, PROBE_LIKELY, PROBE_NO,
};
use instar_vmdk_format::{
    Descriptor, FormatError, Header, Trouble, FOOTER_BYTES, HEADER_BYTES, MAGIC, MAX_DESCRIPTOR_BYTES, SECTOR,
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
    /// VMware tracks changed blocks in another file: true or absent.
    pub const CHANGE_TRACKING: &str = "change-tracking";
    /// Why no part of a commit can be taken, a sentence; absent if nothing stands in the way.
    pub const UNSUPPORTED: &str = "unsupported";
}

/// First bytes of a sparse extent of ESX 2 and 3.
const COWD: [u8; 4] = *b"COWD";
/// How much of a text is looked at to see whether it is a descriptor: more than any comment in front of it.
const TEXT: usize = 4096;

/// See [`FormatPlugin::probe`](instar_plugin_api::FormatPlugin::probe).
pub fn probe(image: &ImageReader<'_>) -> Result<u32, PluginError> {
    let start = image.read_vec(0, TEXT)?;
    Ok(match start.get(..4) {
        Some(magic) if *magic == MAGIC || *magic == COWD => PROBE_CERTAIN,
        _ if is_descriptor(&start) => PROBE_LIKELY,
        _ => PROBE_NO,
    })
}

/// A text whose first line that is neither blank nor a comment gives the version, as QEMU looks for it.
fn is_descriptor(start: &[u8]) -> bool {
    let mut lines = start.split(|&b| b == b'\n').map(<[u8]>::trim_ascii);
    lines
        .find(|line| !line.is_empty() && !line.starts_with(b"#"))
        .is_some_and(|line| matches!(line, b"version=1" | b"version=2" | b"version=3"))
}

fn refused(error: FormatError) -> PluginError {
    let code = match error.trouble {
        Trouble::Unsupported => ErrorCode::UnsupportedFormat,
        Trouble::Corrupt => ErrorCode::ParseFailed,
    };
    PluginError::new(code, error.text)
}

fn unsupported(text: &str) -> PluginError {
    PluginError::new(ErrorCode::UnsupportedFormat, text)
}

/// See [`FormatPlugin::facts`](instar_plugin_api::FormatPlugin::facts).
pub fn read(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
    let start = image.read_vec(0, HEADER_BYTES)?;
    if start.starts_with(&COWD) {
        return Err(unsupported("a sparse extent of ESX (COWD) is not supported: convert it to monolithicSparse"));
    }
    if !start.starts_with(&MAGIC) {
        return of_descriptor_file(image);
    }
    let mut bytes = [0; HEADER_BYTES];
    image.read_exact_at(0, &mut bytes)?;
    let mut header = Header::parse(&bytes).map_err(refused)?;
    let descriptor_at = (header.descriptor_offset, header.descriptor_size);
    if header.directory_is_at_the_end() {
        let mut bytes = [0; FOOTER_BYTES];
        image.read_exact_at(image.length().saturating_sub(FOOTER_BYTES as u64), &mut bytes)?;
        header = Header::parse_footer(&bytes).map_err(refused)?;
    }
    if descriptor_at.0 == 0 || descriptor_at.1 == 0 {
        return Err(unsupported(
            "the file has no descriptor: it is an extent of an image in several files, whose descriptor has to be named",
        ));
    }
    let descriptor = descriptor(image, descriptor_at)?;
    let mut facts = ImageFacts::new("vmdk", header.virtual_size(), header.grain_bytes(), image.length());
    describe(&mut facts, &descriptor);
    if header.has(instar_vmdk_format::flags::COMPRESSED) {
        facts.features.push(Feature::flag(names::COMPRESSED, true, false));
    }
    let sparse = matches!(descriptor.extents.as_slice(), [kind] if kind == b"SPARSE");
    if !sparse || !matches!(descriptor.create_type.as_slice(), b"monolithicSparse" | b"streamOptimized") {
        facts.features.push(several_files(&descriptor));
    }
    Ok(facts)
}

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
    Descriptor::parse(&text).map_err(refused)
}

fn several_files(descriptor: &Descriptor) -> Feature {
    let kind = String::from_utf8_lossy(&descriptor.create_type).escape_default().to_string();
    let text = format!(
        "a vmdk of type {kind} is not supported, only monolithicSparse and streamOptimized: convert it with \
         `qemu-img convert -O vmdk`"
    );
    Feature::text(names::UNSUPPORTED, &text, false)
}

/// A descriptor that is a file of its own: its extents are in other files. It can be shown.
fn of_descriptor_file(image: &ImageReader<'_>) -> Result<ImageFacts, PluginError> {
    let length = image.length().min(MAX_DESCRIPTOR_BYTES);
    let text = image.read_vec(0, usize::try_from(length).unwrap_or(0))?;
    let descriptor = Descriptor::parse(&text).map_err(refused)?;
    let sectors = text
        .split(|&b| b == b'\n')
        .filter_map(|line| {
            let mut words = line.split(|b| b.is_ascii_whitespace()).filter(|word| !word.is_empty());
            words.next().filter(|access| matches!(*access, b"RW" | b"RDONLY" | b"NOACCESS"))?;
            std::str::from_utf8(words.next()?).ok()?.parse::<u64>().ok()
        })
        .try_fold(0u64, u64::checked_add);
    let size = sectors.and_then(|sectors| sectors.checked_mul(SECTOR)).filter(|&size| size <= i64::MAX as u64);
    let size = size.ok_or_else(|| unsupported("the extents of the descriptor are larger than any disk"))?;
    let mut facts = ImageFacts::new("vmdk", size, 0, image.length());
    describe(&mut facts, &descriptor);
    facts.features.push(several_files(&descriptor));
    Ok(facts)
}

/// What the descriptor says.
fn describe(facts: &mut ImageFacts, descriptor: &Descriptor) {
    facts.encrypted = descriptor.encrypted;
    let parent = descriptor.parent();
    if let (Some(_), Some(name)) = (parent, &descriptor.parent_hint) {
        // A parent is a vmdk, too: content IDs are all that is recorded of it.
        let format = ROption::RSome(b"vmdk".to_vec().into());
        facts.backing = ROption::RSome(BackingPointer { name: name.clone().into(), format });
    }
    let recorded = parent.unwrap_or(instar_vmdk_format::NO_PARENT);
    let kind = String::from_utf8_lossy(&descriptor.create_type);
    facts.features.extend([
        Feature::number(names::CID, descriptor.content_id.value.into(), true),
        Feature::number(names::PARENT_CID, recorded.into(), true),
        Feature::text(names::CREATE_TYPE, &kind, true),
    ]);
    if descriptor.change_tracking {
        facts.features.push(Feature::flag(names::CHANGE_TRACKING, true, false));
    }
}
