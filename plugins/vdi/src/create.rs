//! `create`: a new, empty image.

use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{CreateSpec, CreatedImage, ErrorCode, Footprint, ImageRegion, PluginError, ReservedRange};
use instar_vdi_format::{data_offset_of, CreateOptions, Uuid, IDENTITY_BYTES, NEW_BLOCK_BYTES, SECTOR, UUID_BYTES};
use std::hash::{BuildHasher, RandomState};

/// The options with their help.
pub const OPTIONS: &[(&str, &str)] = &[("static", "take the space of the whole disk at once: on or off (default)")];

fn refuse(message: impl Into<String>) -> PluginError {
    PluginError::new(ErrorCode::UnsupportedFormat, message)
}

/// A UUID that no other image has.
fn random() -> Uuid {
    let bits = || RandomState::new().hash_one(std::process::id());
    Uuid::of_bits(bits(), bits())
}

/// The parent's `uuidCreate` and `uuidModify`, which have to be known: without them the new image could not be read.
fn parent(spec: &CreateSpec) -> Result<Option<(Uuid, Uuid)>, PluginError> {
    if spec.backing.is_none() {
        return Ok(None);
    }
    let Some(facts) = spec.backing_facts.as_ref().into_option() else {
        return Err(refuse("a vdi records the UUIDs of its backing file, which has to be looked at: leave out -u"));
    };
    let identity = <[u8; IDENTITY_BYTES]>::try_from(facts.identity.as_slice()).ok();
    let identity = identity.filter(|_| facts.format.as_str() == "vdi");
    let identity = identity.ok_or_else(|| refuse("the backing file of a vdi has to be a vdi"))?;
    let (create, modify) = identity.split_at(UUID_BYTES);
    let uuid = |bytes: &[u8]| <[u8; UUID_BYTES]>::try_from(bytes).map(Uuid).unwrap_or(Uuid::NULL);
    Ok(Some((uuid(create), uuid(modify))))
}

/// The options of a new image.
fn options(spec: &CreateSpec) -> Result<CreateOptions, PluginError> {
    let mut preallocated = false;
    for option in &spec.options {
        preallocated = match (option.0.as_str(), option.1.as_str()) {
            ("static", "on") => true,
            ("static", "off") => false,
            ("static", value) => {
                let value = value.escape_default();
                return Err(refuse(format!("option static cannot be \"{value}\": it must be on or off")));
            }
            (name, _) => {
                let name = name.escape_default();
                return Err(refuse(format!("unknown option \"{name}\": there is static")));
            }
        };
    }
    let parent = parent(spec)?;
    Ok(CreateOptions { virtual_size: spec.virtual_size, preallocated, create: random(), modify: random(), parent })
}

/// How long a new image becomes. It has all of its map from the beginning.
pub fn measure(spec: &CreateSpec) -> Result<Footprint, PluginError> {
    let options = options(spec)?;
    let (_, overhead) = data_offset_of(options.virtual_size).map_err(|error| refuse(error.text))?;
    let virtual_size = options.virtual_size.div_ceil(SECTOR) * SECTOR;
    let (unit, thin) = (NEW_BLOCK_BYTES, !options.preallocated);
    Ok(Footprint { virtual_size, unit, overhead, thin, bitmaps: ROption::RNone })
}

/// Make a new image.
pub fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
    let options = options(spec)?;
    let image = instar_vdi_format::create(&options).map_err(|error| refuse(error.text))?;
    let data = ReservedRange { offset: image.data_offset, length: image.length - image.data_offset, written: false };
    let regions = image.regions.into_iter().map(|(offset, bytes)| ImageRegion { offset, bytes: bytes.into() });
    let reserved = options.preallocated.then_some(data).into_iter().collect();
    Ok(CreatedImage { length: image.length, regions: regions.collect(), reserved, files: RVec::new() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_plugin_api::std_types::Tuple2;
    use instar_plugin_api::{BackingPointer, ImageFacts};
    use instar_vdi_format::Header;

    const MIB: u64 = 1 << 20;

    fn spec(virtual_size: u64, options: &[(&str, &str)]) -> CreateSpec {
        CreateSpec {
            virtual_size,
            file_name: b"disk.vdi".to_vec().into(),
            backing: ROption::RNone,
            backing_facts: ROption::RNone,
            options: options.iter().map(|&(name, value)| Tuple2(name.into(), value.into())).collect(),
        }
    }

    fn header(image: &CreatedImage) -> Header {
        Header::parse(image.regions[0].bytes.as_slice().try_into().unwrap()).unwrap()
    }

    #[test]
    fn each_image_is_another_one() {
        let made = [0, 1].map(|_| header(&create(&spec(5 * MIB, &[])).unwrap()));
        let uuids = [made[0].create, made[0].modify, made[1].create, made[1].modify];
        assert!((0..4).all(|one| (0..one).all(|other| uuids[one] != uuids[other])), "{uuids:?}");
    }

    #[test]
    fn what_is_measured_is_made() {
        for (size, options, length) in [
            (5 * MIB + 1, &[][..], 2 * MIB),
            (5 * MIB + 1, &[("static", "on")], 8 * MIB),
            (1, &[("static", "off")], 2 * MIB),
        ] {
            let (made, measured) = (create(&spec(size, options)).unwrap(), measure(&spec(size, options)).unwrap());
            assert_eq!((made.length, measured.required(0)), (length, Some(length)), "{size}");
            assert_eq!(measured.fully_allocated(), Some(2 * MIB + size.next_multiple_of(MIB)));
            assert_eq!(made.reserved.len(), usize::from(length > 2 * MIB));
        }
        assert!(measure(&spec(0, &[])).is_err() && measure(&spec(u64::MAX, &[])).is_err());
    }

    #[test]
    fn a_child_has_the_uuids_of_its_parent() {
        let mut child = spec(5 * MIB, &[]);
        child.backing = ROption::RSome(BackingPointer::new(b"base.vdi".to_vec(), None));
        assert!(create(&child).unwrap_err().message.contains("leave out -u"));
        let mut facts = ImageFacts::new("vmdk", 5 * MIB, 65536, 0);
        facts.identity = [[3; 16], [4; 16]].concat().into();
        child.backing_facts = ROption::RSome(facts.clone());
        assert!(create(&child).unwrap_err().message.contains("has to be a vdi"));
        facts.format = "vdi".into();
        child.backing_facts = ROption::RSome(facts.clone());
        let made = header(&create(&child).unwrap());
        assert_eq!((made.link, made.parent_modify), (Uuid([3; 16]), Uuid([4; 16])));
        assert!(made.contradiction().is_none());
        child.options = vec![Tuple2("static".into(), "on".into())].into();
        assert!(create(&child).unwrap_err().message.contains("no parent"));
    }

    #[test]
    fn wrong_options_are_named() {
        for (option, why) in
            [(("static", "yes"), "must be on or off"), (("subformat", "x"), "unknown option \"subformat\"")]
        {
            assert!(create(&spec(MIB, &[option])).unwrap_err().message.contains(why));
        }
    }
}
