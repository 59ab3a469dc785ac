//! A new image in several files: whether there are several, and how many, its plugin says before anything of the source was
//! read; files for them are made then, as a confined process makes none.

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

/// Disks of these sizes in bytes are asked for: where both take as many files, any disk does.
const SMALL: u64 = 1 << 20;
const LARGE: u64 = 10 << 30;

/// Files for the parts of the new image, if it has any. What is wrong with its options, its creation says.
///
/// # Errors
/// What the system says.
pub fn parts_of(request: &ConvertRequest, registry: &Registry, new: &NewFile) -> Result<Option<Parts>, Error> {
    let count = match (files_of(request, registry, new, SMALL), files_of(request, registry, new, LARGE)) {
        (None | Some(0), None | Some(0)) => return Ok(None),
        (Some(small), Some(large)) if small == large => small,
        // As many as the guest can be given, as nobody knows how large the disk is; those that are left over go away.
        _ => MAX_FILE_DEVICES,
    };
    Parts::begin(new, count).map(Some)
}

/// Name the other files of an image that is replaced: they stay. What an image names is not removed because of it: an image may
/// name anything that lies beside it.
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

/// How many other files an image for a disk of `virtual_size` bytes has; `None` if there can be no such image.
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
