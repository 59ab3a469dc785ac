//! `create`: a new, empty image.

use instar_plugin_api::std_types::{ROption, RVec};
use instar_plugin_api::{CreateSpec, CreatedImage, ErrorCode, Footprint, ImageRegion, PluginError};
use instar_qcow_format::{l1_place, CreateOptions, Header, SECTOR};

fn refuse(message: impl Into<String>) -> PluginError {
    PluginError::new(ErrorCode::UnsupportedFormat, message)
}

/// The options of a new image. The header has no place for the backing's format: a program that reads the image goes by
/// the first bytes of its backing, and those of a raw one are the guest's to choose.
fn options(spec: &CreateSpec) -> Result<CreateOptions, PluginError> {
    if let Some(option) = spec.options.first() {
        let name = option.0.as_str().escape_default();
        return Err(refuse(format!("unknown option \"{name}\": there are none")));
    }
    let backing = spec.backing.as_ref().into_option();
    let is_raw = |format: &RVec<u8>| format.as_slice() == b"raw";
    if backing.is_some_and(|backing| backing.format.as_ref().into_option().is_some_and(is_raw)) {
        let text = "a qcow cannot record that its backing file is raw, and a guest could make it look like an image: \
                    create a qcow2";
        return Err(refuse(text));
    }
    Ok(CreateOptions { virtual_size: spec.virtual_size, backing: backing.map(|backing| backing.name.to_vec()) })
}

/// How long a new image becomes at most: the start of the file, and all of its L2 tables, besides the clusters.
pub fn measure(spec: &CreateSpec) -> Result<Footprint, PluginError> {
    let options = options(spec)?;
    let image = instar_qcow_format::create(&options).map_err(|error| refuse(error.text))?;
    let header = image.start.first_chunk().map(Header::parse).and_then(Result::ok);
    let header = header.ok_or_else(|| refuse("the new header makes no sense"))?;
    let tables = header.l1_entries().checked_mul(header.table_bytes());
    let start = image.length.checked_next_multiple_of(header.cluster_size());
    let overhead = tables.zip(start).and_then(|(tables, start)| tables.checked_add(start));
    let overhead = overhead.ok_or_else(|| refuse("the image would become longer than 2^63 bytes"))?;
    let virtual_size = options.virtual_size.div_ceil(SECTOR) * SECTOR;
    Ok(Footprint { virtual_size, unit: header.cluster_size(), overhead, thin: true, bitmaps: ROption::RNone })
}

/// Make a new image.
pub fn create(spec: &CreateSpec) -> Result<CreatedImage, PluginError> {
    let options = options(spec)?;
    l1_place(&options).map_err(|error| refuse(error.text))?;
    let image = instar_qcow_format::create(&options).map_err(|error| refuse(error.text))?;
    let regions = vec![ImageRegion { offset: 0, bytes: image.start.into() }].into();
    Ok(CreatedImage { length: image.length, regions, reserved: RVec::new(), files: RVec::new() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_plugin_api::std_types::Tuple2;
    use instar_plugin_api::BackingPointer;

    const MIB: u64 = 1 << 20;

    fn spec(virtual_size: u64, backing: Option<&[u8]>) -> CreateSpec {
        let pointer = |format: &[u8]| BackingPointer::new(b"base".to_vec(), Some(format.to_vec()));
        CreateSpec {
            virtual_size,
            file_name: b"disk.qcow".to_vec().into(),
            backing: backing.map(pointer).into(),
            backing_facts: ROption::RNone,
            options: RVec::new(),
        }
    }

    #[test]
    fn new_images_are_short_whatever_their_size() {
        for (size, length) in [(5 * MIB + 1, 560), (130 * MIB, 48 + 1024)] {
            let image = create(&spec(size, None)).unwrap();
            assert_eq!((image.length, image.regions.len(), image.regions[0].bytes.len()), (length, 1, 48));
        }
        let child = create(&spec(MIB, Some(b"qcow2"))).unwrap();
        assert_eq!((child.length, &child.regions[0].bytes.as_slice()[48..]), (56 + 512, &b"base"[..]));
        for size in [0, u64::MAX] {
            assert!(create(&spec(size, None)).is_err() && measure(&spec(size, None)).is_err());
        }
    }

    #[test]
    fn what_is_measured_bounds_what_is_used() {
        let footprint = measure(&spec(5 * MIB + 1, None)).unwrap();
        assert_eq!((footprint.virtual_size, footprint.unit), (5 * MIB + 512, 4096));
        // A cluster for the start of the file, and three tables.
        assert_eq!(footprint.required(7), Some(4096 + 3 * 4096 + 7 * 4096));
        assert_eq!(footprint.fully_allocated(), Some(4 * 4096 + (5 * MIB + 512).next_multiple_of(4096)));
    }

    #[test]
    fn what_the_header_has_no_place_for_is_refused() {
        assert!(create(&spec(MIB, Some(b"raw"))).unwrap_err().message.contains("create a qcow2"));
        let mut strange = spec(MIB, None);
        strange.options = vec![Tuple2("compat".into(), "v3".into())].into();
        assert!(create(&strange).unwrap_err().message.contains("unknown option \"compat\""));
    }
}
