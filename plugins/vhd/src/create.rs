//! `create`: a new, empty image.

use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{CreateSpec, CreatedImage, ErrorCode, Footprint, ImageRegion, PluginError};
use instar_vhd_format::{CreateOptions, Parent, DATA_ALIGNMENT, DEFAULT_BLOCK, SECTOR};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The options with their help.
pub const OPTIONS: &[(&str, &str)] = &[
    ("subformat", "dynamic (default) or fixed"),
    ("force_size", "on (default): the disk gets exactly the size that is asked for. It is never rounded up"),
];

/// 2000-01-01 00:00:00 UTC in seconds since 1970, from which times in a VHD count.
const EPOCH: u64 = 946_684_800;

fn refuse(message: impl Into<String>) -> PluginError {
    PluginError::new(ErrorCode::UnsupportedFormat, message)
}

/// The options of a new image.
fn options(spec: &CreateSpec) -> Result<CreateOptions, PluginError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let mut options = CreateOptions {
        virtual_size: spec.virtual_size,
        unique_id: random_id(),
        time: u32::try_from(now.saturating_sub(EPOCH)).unwrap_or(0),
        fixed: false,
        block_size: DEFAULT_BLOCK,
        parent: parent(spec)?,
    };
    for option in &spec.options {
        set(&mut options, option.0.as_str(), option.1.as_str()).map_err(refuse)?;
    }
    Ok(options)
}

/// How long a new image becomes.
pub fn measure(spec: &CreateSpec) -> Result<Footprint, PluginError> {
    let options = options(spec)?;
    let image = instar_vhd_format::create(&options).map_err(|error| refuse(error.text))?;
    let virtual_size = spec.virtual_size.div_ceil(SECTOR) * SECTOR;
    let bitmaps = ROption::RNone;
    if options.fixed {
        let overhead = image.length - virtual_size;
        return Ok(Footprint { virtual_size, unit: 1, overhead, thin: false, bitmaps });
    }
    // The bitmap of a block takes up to a page, for its data begins at one.
    let unit = u64::from(options.block_size);
    let overhead = image.length.saturating_add(virtual_size.div_ceil(unit).saturating_mul(DATA_ALIGNMENT));
    Ok(Footprint { virtual_size, unit, overhead: overhead.saturating_add(DATA_ALIGNMENT), thin: true, bitmaps })
}

/// Make a new image.
pub fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
    let image = instar_vhd_format::create(&options(spec)?).map_err(|error| refuse(error.text))?;
    let region = |(offset, bytes): (u64, Vec<u8>)| ImageRegion { offset, bytes: bytes.into() };
    let regions = image.regions.into_iter().map(region).collect();
    Ok(CreatedImage { length: image.length, regions, reserved: RVec::new(), files: RVec::new() })
}

/// A UUID of its own (RFC 9562, version 4).
fn random_id() -> [u8; 16] {
    let half = || RandomState::new().hash_one(std::process::id()).to_be_bytes();
    let mut id = [0; 16];
    id[..8].copy_from_slice(&half());
    id[8..].copy_from_slice(&half());
    id[6] = (id[6] & 0x0f) | 0x40;
    id[8] = (id[8] & 0x3f) | 0x80;
    id
}

/// Name and unique ID of the parent, which has to be known: without it the new image could not be read.
fn parent(spec: &CreateSpec) -> Result<Option<Parent>, PluginError> {
    let Some(backing) = spec.backing.as_ref().into_option() else { return Ok(None) };
    let Some(facts) = spec.backing_facts.as_ref().into_option() else {
        return Err(refuse("a VHD records the unique ID of its backing file, which has to be looked at: leave out -u"));
    };
    let id = facts.identity.as_slice().try_into().ok().filter(|_| facts.format.as_str() == "vpc");
    let id = id.ok_or_else(|| refuse("the backing file of a VHD has to be a VHD (vpc)"))?;
    if spec.virtual_size.div_ceil(SECTOR) * SECTOR != facts.virtual_size {
        let text =
            format!("a VHD has to be as large as its backing file, {} bytes: leave out the size", facts.virtual_size);
        return Err(refuse(text));
    }
    let path = String::from_utf8(backing.name.to_vec()).map_err(|_| {
        refuse("the name of the backing file is not UTF-8, and a VHD records names in Unicode: choose another name")
    })?;
    Ok(Some(Parent { id, path }))
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
        "force_size" if value == "on" => {}
        "force_size" => return Err(wrong("sizes are never rounded up to a geometry: leave it out")),
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
    use instar_plugin_api::{BackingPointer, ImageFacts};

    fn spec(virtual_size: u64, options: &[(&str, &str)]) -> CreateSpec {
        CreateSpec {
            virtual_size,
            file_name: b"disk.vhd".to_vec().into(),
            backing: ROption::RNone,
            backing_facts: ROption::RNone,
            options: options.iter().map(|(name, value)| Tuple2((*name).into(), (*value).into())).collect(),
        }
    }

    fn over(name: &[u8], size: u64, facts: Option<ImageFacts>) -> CreateSpec {
        let backing = ROption::RSome(BackingPointer::new(name.to_vec(), Some(b"vpc".to_vec())));
        CreateSpec { backing, backing_facts: facts.into(), ..spec(size, &[]) }
    }

    #[test]
    fn what_is_measured_covers_what_is_made() {
        for size in [1, 512, 5 << 30] {
            let (made, measured) = (create(&spec(size, &[])).unwrap(), measure(&spec(size, &[])).unwrap());
            assert!(measured.required(0).unwrap() >= made.length && measured.thin);
            assert!(measured.fully_allocated().unwrap() >= size + made.length);
            let fixed = &[("subformat", "fixed")];
            let (made, measured) = (create(&spec(size, fixed)).unwrap(), measure(&spec(size, fixed)).unwrap());
            assert_eq!((measured.required(0), measured.fully_allocated()), (Some(made.length), Some(made.length)));
        }
    }

    #[test]
    fn what_cannot_be_made_is_named() {
        let refused = |spec: CreateSpec| create(&spec).unwrap_err().message.into_string();
        assert!(refused(spec(0, &[])).contains("512 bytes to 2040 GiB"));
        assert!(refused(spec(1 << 20, &[("subformat", "x")])).contains("dynamic or fixed"));
        assert!(refused(spec(1 << 20, &[("force_size", "off")])).contains("never rounded"));
        assert!(refused(spec(1 << 20, &[("block", "1")])).contains("unknown option"));
        let mut facts = ImageFacts::new("vpc", 1 << 20, 2 << 20, 1 << 20);
        assert!(refused(over(b"base.vhd", 1 << 20, None)).contains("leave out -u"));
        assert!(refused(over(b"base.vhd", 1 << 20, Some(facts.clone()))).contains("has to be a VHD"));
        facts.identity = vec![7; 16].into();
        assert!(create(&over(b"base.vhd", 1 << 20, Some(facts.clone()))).is_ok());
        assert!(refused(over(b"base.vhd", 2 << 20, Some(facts.clone()))).contains("as large as"));
        assert!(refused(over(b"b\xff.vhd", 1 << 20, Some(facts))).contains("UTF-8"));
    }

    #[test]
    fn identities_are_random() {
        assert_ne!(random_id(), random_id());
        assert_eq!(random_id()[6] >> 4, 4);
    }
}
