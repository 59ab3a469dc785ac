//! `create`: a new, empty image.

use instar_parallels_format::{CreateOptions, NewImage, DEFAULT_CLUSTER, SECTOR};
use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{CreateSpec, CreatedImage, ErrorCode, Footprint, ImageRegion, PluginError};

/// The options with their help.
pub const OPTIONS: &[(&str, &str)] = &[("cluster_size", "bytes of a cluster, a power of two (default: 1048576)")];

fn refuse(message: impl Into<String>) -> PluginError {
    PluginError::new(ErrorCode::UnsupportedFormat, message)
}

/// The options of a new image.
fn options(spec: &CreateSpec) -> Result<CreateOptions, PluginError> {
    if spec.backing.is_some() {
        let text =
            "a parallels image records no parent: create it without one, of the parent's size, and name the parent \
                    with -b when it is committed";
        return Err(refuse(text));
    }
    let mut cluster = DEFAULT_CLUSTER;
    for option in &spec.options {
        cluster = match (option.0.as_str(), option.1.as_str()) {
            ("cluster_size", value) => value.parse().map_err(|_| {
                let value = value.escape_default();
                refuse(format!("option cluster_size cannot be \"{value}\": it is a number of bytes"))
            })?,
            (name, _) => {
                let name = name.escape_default();
                return Err(refuse(format!("unknown option \"{name}\": there is cluster_size")));
            }
        };
    }
    Ok(CreateOptions { virtual_size: spec.virtual_size, cluster })
}

fn new_image(options: &CreateOptions) -> Result<NewImage, PluginError> {
    instar_parallels_format::create(options).map_err(|error| refuse(error.text))
}

/// How long a new image becomes. It has all of its BAT from the beginning.
pub fn measure(spec: &CreateSpec) -> Result<Footprint, PluginError> {
    let options = options(spec)?;
    let overhead = new_image(&options)?.length;
    let virtual_size = options.virtual_size.next_multiple_of(SECTOR);
    Ok(Footprint { virtual_size, unit: options.cluster, overhead, thin: true, bitmaps: ROption::RNone })
}

/// Make a new image.
pub fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
    let image = new_image(&options(spec)?)?;
    let regions = vec![ImageRegion { offset: 0, bytes: image.start.to_vec().into() }].into();
    Ok(CreatedImage { length: image.length, regions, reserved: RVec::new(), files: RVec::new() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_plugin_api::std_types::Tuple2;
    use instar_plugin_api::BackingPointer;

    const MIB: u64 = 1 << 20;

    fn spec(virtual_size: u64, options: &[(&str, &str)]) -> CreateSpec {
        CreateSpec {
            virtual_size,
            file_name: b"disk.hds".to_vec().into(),
            backing: ROption::RNone,
            backing_facts: ROption::RNone,
            options: options.iter().map(|&(name, value)| Tuple2(name.into(), value.into())).collect(),
        }
    }

    #[test]
    fn what_is_measured_is_made() {
        for (size, options, length) in
            [(5 * MIB + 1, &[][..], MIB), (5 * MIB + 1, &[("cluster_size", "4096")], 8192), (1, &[], MIB)]
        {
            let (made, measured) = (create(&spec(size, options)).unwrap(), measure(&spec(size, options)).unwrap());
            assert_eq!((made.length, measured.required(0)), (length, Some(length)), "{size}");
            assert_eq!((made.regions.len(), made.regions[0].bytes.len()), (1, 64));
            assert_eq!(measured.virtual_size, size.next_multiple_of(512));
        }
        for (size, options) in [(0, &[][..]), (u64::MAX, &[]), (MIB, &[("cluster_size", "1000")])] {
            assert!(measure(&spec(size, options)).is_err() && create(&spec(size, options)).is_err());
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        let mut child = spec(MIB, &[]);
        child.backing = ROption::RSome(BackingPointer::new(b"base.hds".to_vec(), None));
        assert!(create(&child).unwrap_err().message.contains("records no parent"));
        for (option, why) in [(("cluster_size", "1M"), "a number of bytes"), (("x", "y"), "unknown option \"x\"")] {
            assert!(create(&spec(MIB, &[option])).unwrap_err().message.contains(why));
        }
    }
}
