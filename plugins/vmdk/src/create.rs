//! `create`: a new, empty image.

use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{CreateSpec, CreatedFile, CreatedImage, ErrorCode, Footprint, ImageRegion, PluginError};
use instar_vmdk_format::{CreateOptions, NewFile, Subformat, NEW_GRAIN_BYTES, NO_PARENT, SECTOR};
use std::hash::{BuildHasher, RandomState};

/// The options with their help.
pub const OPTIONS: &[(&str, &str)] = &[
    (
        "subformat",
        "monolithicSparse (default), monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat or streamOptimized",
    ),
    ("zeroed_grain", "let an entry stand for a grain of zeroes: on or off (default)"),
    ("adapter_type", "ide (default), lsilogic, buslogic or legacyESX"),
    ("compat6", "hardware version 6 instead of 4: on or off (default)"),
    ("hwversion", "hardware version, a number (default 4)"),
];

fn refuse(message: impl Into<String>) -> PluginError {
    PluginError::new(ErrorCode::UnsupportedFormat, message)
}

/// The options of a new image.
fn options(spec: &CreateSpec) -> Result<CreateOptions, PluginError> {
    let mut options = CreateOptions {
        virtual_size: spec.virtual_size,
        file_name: spec.file_name.to_vec(),
        content_id: random(),
        parent: parent(spec)?,
        subformat: Subformat::MonolithicSparse,
        zeroed_grains: false,
        adapter_type: "ide".into(),
        hardware_version: "4".into(),
    };
    for option in &spec.options {
        set(&mut options, option.0.as_str(), option.1.as_str()).map_err(refuse)?;
    }
    Ok(options)
}

/// Length of a long file name in bytes.
const LONG_NAME: usize = 200;

/// How long a new image becomes. It has all of its tables from the beginning.
pub fn measure(spec: &CreateSpec) -> Result<Footprint, PluginError> {
    let mut options = options(spec)?;
    if options.file_name.is_empty() {
        // A question for the length has no name for it yet. The descriptor of a disk in several files has one for each.
        options.file_name = [&[b'n'; LONG_NAME][..], b".vmdk"].concat();
    }
    let thin = match options.subformat {
        Subformat::MonolithicSparse | Subformat::SplitSparse => true,
        Subformat::MonolithicFlat | Subformat::SplitFlat => false,
        Subformat::StreamOptimized => {
            return Err(refuse("how long a streamOptimized vmdk becomes depends on how well its content is compressed"))
        }
    };
    let too_large = || refuse("the disk is too large");
    let virtual_size = options.virtual_size.checked_next_multiple_of(SECTOR).ok_or_else(too_large)?;
    let mut disk = instar_vmdk_format::create(&options).map_err(|error| refuse(error.text))?;
    // Some programs pad a descriptor to whole sectors.
    disk.image.length = disk.image.length.checked_next_multiple_of(SECTOR).ok_or_else(too_large)?;
    if !thin {
        let bitmaps = ROption::RNone;
        return Ok(Footprint { virtual_size, unit: 1, overhead: disk.image.length, thin, bitmaps });
    }
    let overhead = disk.files.iter().try_fold(disk.image.length, |sum, file| sum.checked_add(file.image.length));
    let overhead = overhead.ok_or_else(too_large)?;
    Ok(Footprint { virtual_size, unit: NEW_GRAIN_BYTES, overhead, thin, bitmaps: ROption::RNone })
}

/// Make a new image.
pub fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
    let options = options(spec)?;
    let image = instar_vmdk_format::create(&options).map_err(|error| refuse(error.text))?;
    let file = |file: NewFile| CreatedFile {
        name: file.name.into(),
        length: file.image.length,
        regions: regions(file.image.regions),
    };
    let files = image.files.into_iter().map(file).collect::<RVec<_>>();
    let reserved = RVec::new();
    Ok(CreatedImage { length: image.image.length, regions: regions(image.image.regions), reserved, files })
}

fn regions(regions: Vec<(u64, Vec<u8>)>) -> RVec<ImageRegion> {
    regions.into_iter().map(|(offset, bytes)| ImageRegion { offset, bytes: bytes.into() }).collect()
}

/// A content ID without a meaning of its own.
fn random() -> u32 {
    let number = RandomState::new().hash_one(std::process::id());
    u32::try_from(number % u64::from(NO_PARENT - 2)).unwrap_or(1).max(1)
}

/// Name and content ID of the parent, which has to be known: without it the new image could not be read.
fn parent(spec: &CreateSpec) -> Result<Option<(Vec<u8>, u32)>, PluginError> {
    let Some(backing) = spec.backing.as_ref().into_option() else { return Ok(None) };
    let Some(facts) = spec.backing_facts.as_ref().into_option() else {
        return Err(refuse(
            "a vmdk records the content ID of its backing file, which has to be looked at: leave out -u",
        ));
    };
    let id = facts.identity.as_slice().try_into().ok().filter(|_| facts.format.as_str() == "vmdk");
    let id = id.ok_or_else(|| refuse("the backing file of a vmdk has to be a vmdk"))?;
    Ok(Some((backing.name.to_vec(), u32::from_be_bytes(id))))
}

fn set(options: &mut CreateOptions, name: &str, value: &str) -> Result<(), String> {
    let wrong = |wanted: &str| format!("option {name} cannot be \"{}\": {wanted}", value.escape_default());
    let switch = || match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(wrong("it must be on or off")),
    };
    match name {
        "subformat" => {
            options.subformat = match value {
                "monolithicSparse" => Subformat::MonolithicSparse,
                "streamOptimized" => Subformat::StreamOptimized,
                "monolithicFlat" => Subformat::MonolithicFlat,
                "twoGbMaxExtentSparse" => Subformat::SplitSparse,
                "twoGbMaxExtentFlat" => Subformat::SplitFlat,
                _ => {
                    return Err(wrong(
                        "it must be monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat or \
                         streamOptimized",
                    ))
                }
            };
        }
        "zeroed_grain" => options.zeroed_grains = switch()?,
        "adapter_type" => match value {
            "ide" | "lsilogic" | "buslogic" | "legacyESX" => options.adapter_type = value.into(),
            _ => return Err(wrong("it must be ide, lsilogic, buslogic or legacyESX")),
        },
        "compat6" => {
            if switch()? {
                options.hardware_version = "6".into();
            }
        }
        "hwversion" => match value.parse::<u16>() {
            Ok(number) => options.hardware_version = number.to_string(),
            Err(_) => return Err(wrong("it must be a number")),
        },
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
    use instar_plugin_api::std_types::{ROption, Tuple2};

    fn spec(virtual_size: u64, subformat: &str) -> CreateSpec {
        CreateSpec {
            virtual_size,
            file_name: b"disk.vmdk".to_vec().into(),
            backing: ROption::RNone,
            backing_facts: ROption::RNone,
            options: vec![Tuple2("subformat".into(), subformat.into())].into(),
        }
    }

    #[test]
    fn a_sparse_disk_takes_its_tables_and_grains() {
        for (size, subformat) in
            [(1, "monolithicSparse"), (5 << 30, "monolithicSparse"), (5 << 30, "twoGbMaxExtentSparse")]
        {
            let spec = spec(size, subformat);
            let (made, measured) = (create(&spec).unwrap(), measure(&spec).unwrap());
            let length = made.length.next_multiple_of(SECTOR) + made.files.iter().map(|file| file.length).sum::<u64>();
            assert_eq!(measured.required(0), Some(length), "{size} {subformat}");
            assert_eq!(measured.fully_allocated(), Some(length + size.next_multiple_of(65536)), "{size} {subformat}");
        }
        // Header and descriptor, two directories of one sector, and ten tables of 2 KiB for each.
        assert_eq!(measure(&spec(320 << 20, "monolithicSparse")).unwrap().overhead, 65536);
    }

    #[test]
    fn a_flat_disk_takes_all_of_its_size() {
        for subformat in ["monolithicFlat", "twoGbMaxExtentFlat"] {
            let spec = spec((5 << 30) + 1, subformat);
            let (made, measured) = (create(&spec).unwrap(), measure(&spec).unwrap());
            assert_eq!(measured.required(0), Some(made.length.next_multiple_of(SECTOR) + (5 << 30) + SECTOR));
            assert_eq!(measured.required(0), measured.fully_allocated());
        }
    }

    #[test]
    fn what_cannot_be_measured() {
        assert!(measure(&spec(1 << 20, "streamOptimized")).unwrap_err().message.contains("compressed"));
        for subformat in ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentFlat"] {
            assert!(measure(&spec(u64::MAX, subformat)).is_err());
        }
        let nameless = CreateSpec { file_name: RVec::new(), ..spec(1 << 20, "monolithicFlat") };
        assert!(measure(&nameless).is_ok());
    }
}
