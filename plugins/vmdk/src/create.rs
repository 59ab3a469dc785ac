//! `create`: a new, empty image.

use instar_plugin_api::std_types::RVec;
use instar_plugin_api::{CreateSpec, CreatedFile, CreatedImage, ErrorCode, ImageRegion, PluginError};
use instar_vmdk_format::{CreateOptions, NewFile, Subformat, NO_PARENT};
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

/// Make a new image.
pub fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
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
