//! The work and the reports after the guest has filled the target.

use super::request::ConvertRequest;
use crate::commit::CommitEvents;
use crate::devices::{Device, Devices};
use crate::error::Error;
use crate::escape::{escape, escape_path};
use crate::operation::{DevicePaths, Ended};
use instar_guest_abi::ErrorCode;
use instar_guest_protocol::commit::Ignored;
use rustix::fs::{fallocate, FallocateFlags};
use rustix::io::{retry_on_intr, Errno};
use std::fs::File;
use std::io;
use std::path::Path;

/// Make the file system reserve space for all of the target's files, if the request says so.
///
/// # Errors
/// [`ErrorCode::NoSpace`], and the system's other errors.
pub fn allocate(request: &ConvertRequest, ended: &Ended<CommitEvents>) -> Result<(), Error> {
    let files = ended.paths.target().filter(|number| request.allocate && !ended.paths.is_block_device(*number));
    files.filter_map(|number| ended.devices.device(number)).try_for_each(|device| keep_space(request, device.file()))
}

fn keep_space(request: &ConvertRequest, file: &File) -> Result<(), Error> {
    let failed = |code, error: &io::Error| Error::io(&request.target, code, "cannot be allocated", error);
    let length = file.metadata().map_err(|error| failed(ErrorCode::BackingIo, &error))?.len();
    if length == 0 {
        return Ok(());
    }
    match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, length)) {
        // The disk reads the same without it.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(errno @ (Errno::NOSPC | Errno::DQUOT)) => Err(failed(ErrorCode::NoSpace, &errno.into())),
        Err(errno) => Err(failed(ErrorCode::BackingIo, &errno.into())),
    }
}

/// The line about damage that did not keep an image from being read.
pub fn ignored(paths: &DevicePaths, damage: &Ignored) -> String {
    let path = escape_path(paths.get(damage.device).unwrap_or(Path::new("")));
    let place = if damage.offset == u64::MAX { String::new() } else { format!(" (at offset {})", damage.offset) };
    let text = escape(&damage.text);
    format!("'{path}': {text}{place}: ignored, to read what can be read")
}

/// The unreadable ranges of a device, one line each.
pub fn salvaged(devices: &Devices, paths: &DevicePaths, number: u32) -> Vec<String> {
    let (ranges, bytes) = devices.device(number).map(Device::salvaged).unwrap_or_default();
    let path = escape_path(paths.get(number).unwrap_or(Path::new("")));
    let mut told = 0;
    let line = |range: &std::ops::Range<u64>| {
        told += range.end - range.start;
        format!(
            "'{path}': {} bytes from offset {} on cannot be read, and are zero in the copy",
            range.end - range.start,
            range.start
        )
    };
    let mut lines: Vec<String> = ranges.iter().map(line).collect();
    if bytes > told {
        lines.push(format!("'{path}': {} more bytes cannot be read, and are zero in the copy", bytes - told));
    }
    lines
}
