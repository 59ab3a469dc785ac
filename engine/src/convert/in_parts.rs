//! A new image in several files: whether there are several, and how many, its plugin says before anything of the source was
//! read; files for them are made then, as a confined process makes none.

use super::request::ConvertRequest;
use crate::create::{options_of, plugin_of, NewFile, Parts};
use crate::error::Error;
use crate::plugins::Registry;
use instar_guest_abi::MAX_FILE_DEVICES;
use instar_plugin_api::std_types::ROption;
use instar_plugin_api::CreateSpec;
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
