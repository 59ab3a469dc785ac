//! A new image in several files. A confined process cannot create files, so the engine asks the plugin for the number
//! of files before it reads the source, and creates them then.

use super::request::ConvertRequest;
use crate::create::{options_of, plugin_of, NewFile, Parts};
use crate::error::Error;
use crate::escape::escape_path;
use crate::image::OpenedFile;
use crate::plugins::Registry;
use instar_guest_abi::MAX_FILE_DEVICES;
use instar_plugin_api::std_types::ROption;
use instar_plugin_api::CreateSpec;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// The disk sizes in bytes to ask the plugin about: if both take the same number of files, any disk does.
const SMALL: u64 = 1 << 20;
const LARGE: u64 = 10 << 30;

/// Make files for the parts of the new image, if it has any. Wrong options are reported when the image is created.
///
/// # Errors
/// The system's error.
pub fn parts_of(request: &ConvertRequest, registry: &Registry, new: &NewFile) -> Result<Option<Parts>, Error> {
    let count = match (files_of(request, registry, new, SMALL), files_of(request, registry, new, LARGE)) {
        (None | Some(0), None | Some(0)) => return Ok(None),
        (Some(small), Some(large)) if small == large => small,
        // The size of the disk is unknown yet, so make as many files as a guest can have; unused ones vanish.
        _ => MAX_FILE_DEVICES,
    };
    Parts::begin(new, count).map(Some)
}

/// Name the other files of an image that is replaced. They stay: an image may name anything that lies beside it, so the name
/// alone is no reason to remove a file.
pub fn left_over(registry: &Registry, replaced: &OpenedFile) -> Option<String> {
    let beside = |name: &Vec<u8>| replaced.directory.entry(OsStr::from_bytes(name)).is_ok();
    let files = registry.recorded_files(&replaced.file);
    let mut there = files.iter().filter(|name| !name.contains(&b'/') && beside(name));
    let first = replaced.directory.path().join(OsStr::from_bytes(there.next()?));
    let others = match there.count() {
        0 => String::new(),
        others => format!(" and {others} more"),
    };
    let (first, path) = (escape_path(&first), escape_path(&replaced.path));
    Some(format!("'{first}'{others}: named by the image '{path}' that is replaced, and left as it is; remove it if nothing else needs it"))
}

/// The number of other files that an image for a disk of `virtual_size` bytes has; `None` if no such image can exist.
fn files_of(request: &ConvertRequest, registry: &Registry, new: &NewFile, virtual_size: u64) -> Option<usize> {
    // Only a format with options has kinds of images.
    let plugin = plugin_of(registry, &request.target_format).ok().filter(|_| !request.options.is_empty())?;
    let spec = CreateSpec {
        virtual_size,
        file_name: new.name().as_bytes().to_vec().into(),
        backing: ROption::RNone,
        backing_facts: ROption::RNone,
        options: options_of(&request.options),
    };
    plugin.create(&spec).ok().map(|image| image.files.len())
}
