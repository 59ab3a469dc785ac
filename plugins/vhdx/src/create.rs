//! `create`: a new, empty image.

use crate::facts::names;
use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{CreateSpec, CreatedImage, ErrorCode, Footprint, ImageFacts, ImageRegion, PluginError};
use instar_vhdx_format::{
    CreateOptions, Guid, Layout, Parent, ALIGNMENT, BITMAP_BLOCK, DEFAULT_BLOCK, DEFAULT_CHILD_BLOCK,
};
use std::hash::{BuildHasher, RandomState};

/// The options with their help.
pub const OPTIONS: &[(&str, &str)] = &[
    ("subformat", "dynamic (default) or fixed"),
    ("block_size", "bytes of a block: a power of two from 1M to 256M; by default 32M, or 2M with a backing file"),
    (
        "logical_sector_size",
        "bytes of a sector as a guest sees it: 512 (default, or as the backing file has it) or 4096",
    ),
];

fn refuse(message: impl Into<String>) -> PluginError {
    PluginError::new(ErrorCode::UnsupportedFormat, message)
}

/// A GUID that is drawn.
fn random() -> Guid {
    let half = || RandomState::new().hash_one(std::process::id());
    Guid::of_bits(half(), half())
}

/// The options of a new image.
fn options(spec: &CreateSpec) -> Result<CreateOptions, PluginError> {
    let parent = parent(spec)?;
    let mut options = CreateOptions {
        virtual_size: spec.virtual_size,
        block_size: if parent.is_some() { DEFAULT_CHILD_BLOCK } else { DEFAULT_BLOCK },
        logical_sector: 512,
        physical_sector: 4096,
        fixed: false,
        file_write: random(),
        data_write: random(),
        disk_id: random(),
        parent: None,
    };
    for option in &spec.options {
        set(&mut options, option.0.as_str(), option.1.as_str()).map_err(refuse)?;
    }
    if let Some((parent, facts)) = parent {
        inherit(spec, &mut options, facts)?;
        options.parent = Some(parent);
    }
    Ok(options)
}

/// What a child has from its parent: "an implementation MUST copy all metadata items with this field set" (2.6.1.2).
fn inherit(spec: &CreateSpec, options: &mut CreateOptions, facts: &ImageFacts) -> Result<(), PluginError> {
    let number = |name| facts.number(name).and_then(|bytes| u32::try_from(bytes).ok());
    let id = facts.text(names::DISK_ID).and_then(|text| Guid::parse(format!("{{{text}}}").encode_utf16()));
    let (Some(logical), Some(physical), Some(id)) = (number(names::LOGICAL), number(names::PHYSICAL), id) else {
        return Err(refuse("the backing file of a VHDX has to be a VHDX"));
    };
    let asked = spec.options.iter().any(|option| option.0 == "logical_sector_size");
    if asked && options.logical_sector != logical {
        let text = format!("logical_sector_size has to be the backing file's, {logical}: leave it out");
        return Err(refuse(text));
    }
    if let Some(item) = facts.text(names::FOREIGN) {
        // A child would have to copy it.
        return Err(refuse(format!("metadata item {item} of the backing file belongs to the disk, and is not known")));
    }
    if spec.virtual_size.next_multiple_of(logical.into()) != facts.virtual_size {
        let text =
            format!("a VHDX has to be as large as its backing file, {} bytes: leave out the size", facts.virtual_size);
        return Err(refuse(text));
    }
    (options.logical_sector, options.physical_sector, options.disk_id) = (logical, physical, id);
    Ok(())
}

/// How long a new image becomes.
pub fn measure(spec: &CreateSpec) -> Result<Footprint, PluginError> {
    let options = options(spec)?;
    let image = instar_vhdx_format::create(&options).map_err(|error| refuse(error.text))?;
    let (sector, unit) = (u64::from(options.logical_sector), u64::from(options.block_size));
    let virtual_size = spec.virtual_size.next_multiple_of(sector);
    let bitmaps = ROption::RNone;
    if options.fixed {
        let overhead = image.length - virtual_size.next_multiple_of(unit);
        // The last block is stored whole.
        return Ok(Footprint { virtual_size, unit, overhead, thin: false, bitmaps });
    }
    let layout = Layout { block_size: unit, sector, size: virtual_size, has_parent: options.parent.is_some() };
    let chunks = if layout.has_parent { layout.blocks().div_ceil(layout.chunk_ratio()) } else { 0 };
    let overhead = image.length.saturating_add(chunks.saturating_mul(BITMAP_BLOCK)).next_multiple_of(ALIGNMENT);
    Ok(Footprint { virtual_size, unit, overhead, thin: true, bitmaps })
}

/// Make a new image.
pub fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
    let image = instar_vhdx_format::create(&options(spec)?).map_err(|error| refuse(error.text))?;
    let region = |(offset, bytes): (u64, Vec<u8>)| ImageRegion { offset, bytes: bytes.into() };
    let regions = image.regions.into_iter().map(region).collect();
    Ok(CreatedImage { length: image.length, regions, reserved: RVec::new(), files: RVec::new() })
}

/// Path and identity of the parent, which has to be known: without it the new image could not be read.
fn parent(spec: &CreateSpec) -> Result<Option<(Parent, &ImageFacts)>, PluginError> {
    let Some(backing) = spec.backing.as_ref().into_option() else { return Ok(None) };
    let Some(facts) = spec.backing_facts.as_ref().into_option() else {
        let text = "a VHDX records the DataWriteGuid of its backing file, which has to be looked at: leave out -u";
        return Err(refuse(text));
    };
    let id = facts.identity.as_slice().try_into().ok().filter(|_| facts.format.as_str() == "vhdx");
    let data_write = Guid(id.ok_or_else(|| refuse("the backing file of a VHDX has to be a VHDX"))?);
    let path = String::from_utf8(backing.name.to_vec()).map_err(|_| {
        refuse("the name of the backing file is not UTF-8, and a VHDX records names in Unicode: choose another name")
    })?;
    Ok(Some((Parent { data_write, path }, facts)))
}

/// A number of bytes, with or without a unit; nothing if it is none that fits.
fn bytes(value: &str) -> Option<u32> {
    let (digits, shift) = match value.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 10),
        None => value.strip_suffix(['m', 'M']).map_or((value, 0), |digits| (digits, 20)),
    };
    digits.parse::<u32>().ok()?.checked_mul(1 << shift)
}

fn set(options: &mut CreateOptions, name: &str, value: &str) -> Result<(), String> {
    let wrong = |wanted: &str| format!("option {name} cannot be \"{}\": {wanted}", value.escape_default());
    match name {
        "subformat" => {
            options.fixed = match value {
                "dynamic" => false,
                "fixed" => true,
                _ => return Err(wrong("it must be dynamic or fixed")),
            };
        }
        "block_size" => {
            let good = bytes(value).filter(|bytes| bytes.is_power_of_two() && (1 << 20..=256 << 20).contains(bytes));
            options.block_size = good.ok_or_else(|| wrong("it must be a power of two from 1M to 256M"))?;
        }
        "logical_sector_size" => {
            let good = bytes(value).filter(|bytes| [512, 4096].contains(bytes));
            options.logical_sector = good.ok_or_else(|| wrong("it must be 512 or 4096"))?;
        }
        _ => {
            let known: Vec<&str> = OPTIONS.iter().map(|(name, _)| *name).collect();
            return Err(format!("unknown option \"{}\": there are {}", name.escape_default(), known.join(", ")));
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_plugin_api::std_types::Tuple2;
    use instar_plugin_api::{BackingPointer, Feature};

    fn spec(virtual_size: u64, options: &[(&str, &str)]) -> CreateSpec {
        CreateSpec {
            virtual_size,
            file_name: b"disk.vhdx".to_vec().into(),
            backing: ROption::RNone,
            backing_facts: ROption::RNone,
            options: options.iter().map(|(name, value)| Tuple2((*name).into(), (*value).into())).collect(),
        }
    }

    fn base(size: u64) -> ImageFacts {
        let mut facts = ImageFacts::new("vhdx", size, 1 << 20, 1 << 20);
        facts.identity = vec![7; 16].into();
        facts.features.push(Feature::text(names::DISK_ID, &Guid([8; 16]).to_string(), true));
        facts.features.push(Feature::number(names::LOGICAL, 4096, true));
        facts.features.push(Feature::number(names::PHYSICAL, 4096, true));
        facts
    }

    fn over(name: &[u8], size: u64, facts: Option<ImageFacts>) -> CreateSpec {
        let backing = ROption::RSome(BackingPointer::new(name.to_vec(), Some(b"vhdx".to_vec())));
        CreateSpec { backing, backing_facts: facts.into(), ..spec(size, &[]) }
    }

    #[test]
    fn what_is_measured_covers_what_is_made() {
        for size in [1, 512, 5 << 30] {
            let (made, measured) = (create(&spec(size, &[])).unwrap(), measure(&spec(size, &[])).unwrap());
            assert!(measured.required(0).unwrap() >= made.length && measured.thin);
            assert!(measured.fully_allocated().unwrap() >= size + made.length);
            let fixed = &[("subformat", "fixed"), ("block_size", "1M")];
            let (made, measured) = (create(&spec(size, fixed)).unwrap(), measure(&spec(size, fixed)).unwrap());
            assert_eq!((measured.required(0), measured.fully_allocated()), (Some(made.length), Some(made.length)));
        }
    }

    #[test]
    fn a_child_has_what_belongs_to_the_disk_from_its_parent() {
        let options = options(&over(b"base.vhdx", 1 << 20, Some(base(1 << 20)))).unwrap();
        assert_eq!((options.logical_sector, options.physical_sector, options.disk_id), (4096, 4096, Guid([8; 16])));
        assert_eq!((options.block_size, options.parent.unwrap().data_write), (2 << 20, Guid([7; 16])));
    }

    #[test]
    fn what_cannot_be_made_is_named() {
        let refused = |spec: CreateSpec| create(&spec).unwrap_err().message.into_string();
        assert!(refused(spec(0, &[])).contains("64 TiB"));
        assert!(refused(spec(1 << 20, &[("subformat", "x")])).contains("dynamic or fixed"));
        for value in ["3M", "512K", "512M", "x", "99999999999"] {
            assert!(refused(spec(1 << 20, &[("block_size", value)])).contains("from 1M to 256M"), "{value}");
        }
        assert!(refused(spec(1 << 20, &[("logical_sector_size", "1k")])).contains("512 or 4096"));
        assert!(refused(spec(1 << 20, &[("log", "1")])).contains("unknown option"));
        assert!(refused(over(b"base.vhdx", 1 << 20, None)).contains("leave out -u"));
        let raw = ImageFacts::new("raw", 1 << 20, 0, 1 << 20);
        assert!(refused(over(b"base.vhdx", 1 << 20, Some(raw))).contains("has to be a VHDX"));
        assert!(refused(over(b"base.vhdx", 2 << 20, Some(base(1 << 20)))).contains("as large as"));
        assert!(refused(over(b"b\xff.vhdx", 1 << 20, Some(base(1 << 20)))).contains("UTF-8"));
        let mut foreign = base(1 << 20);
        foreign.features.push(Feature::text(names::FOREIGN, "0123", false));
        assert!(refused(over(b"base.vhdx", 1 << 20, Some(foreign))).contains("item 0123"));
        let sectors = CreateSpec {
            options: spec(0, &[("logical_sector_size", "512")]).options,
            ..over(b"base.vhdx", 1 << 20, Some(base(1 << 20)))
        };
        assert!(refused(sectors).contains("leave it out"));
    }

    #[test]
    fn identities_are_random() {
        assert_ne!(random(), random());
    }
}
