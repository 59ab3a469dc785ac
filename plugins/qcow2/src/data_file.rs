//! The external data file that an image names: see "External Data File Name Header Extension" in the specification. The engine
//! opens it as it opens every file that an image names; nothing here follows a name.

use instar_plugin_api::std_types::RVec;
use instar_plugin_api::ImageFile;
use instar_qcow2_format::{autoclear, incompatible, ExtensionKind, Header};

/// Longest name of a file in bytes (`PATH_MAX` without its end).
const LONGEST_NAME: usize = 4095;

/// The name as it stands in the image, if it has a data file and says which. Hostile.
pub fn recorded(header: &Header) -> Option<&[u8]> {
    let extension = header.extension(ExtensionKind::DataFile).filter(|_| header.has(incompatible::DATA_FILE));
    extension.map(|extension| extension.data.as_slice())
}

/// Whether the data file is to be read as a disk of its own, too.
pub fn is_raw(header: &Header) -> bool {
    header.autoclear & autoclear::DATA_FILE_RAW != 0
}

/// Why an image cannot be used with its data file, in one clause; `None` if nothing stands in the way, or if it has none.
pub fn refusal(header: &Header) -> Option<&'static str> {
    if !header.has(incompatible::DATA_FILE) {
        return None;
    }
    let name = recorded(header).unwrap_or_default();
    match () {
        () if name.is_empty() => Some(
            "it has an external data file and does not say which: let the program that made it record its name in the image",
        ),
        () if name.len() > LONGEST_NAME || name.contains(&0) => {
            Some("the name of its external data file is that of no file: the header is damaged, restore the image")
        }
        () if header.snapshots != 0 => {
            Some("it has internal snapshots and an external data file, which exclude each other: the header is damaged")
        }
        () if is_raw(header) && header.backing_name.is_some() => Some(
            "it has a backing file, and an external data file that is said to be complete without it (data_file_raw): which of the \
             two holds, nothing tells",
        ),
        () => None,
    }
}

/// The data file, for [`FormatPlugin::files`](instar_plugin_api::FormatPlugin::files): plain bytes, whatever they look like.
pub fn files(header: &Header) -> Vec<ImageFile> {
    let name = recorded(header).filter(|_| refusal(header).is_none());
    let file = |name: &[u8]| ImageFile {
        name: name.to_vec().into(),
        other_names: RVec::new(),
        grows: true,
        format: "raw".into(),
    };
    name.into_iter().map(file).collect()
}
