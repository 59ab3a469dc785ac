//! `--wipe`: the conditions under which "overwritten" means something.

use super::request::CommitRequest;
use super::verdict::Parts;
use crate::devices::Cache;
use crate::error::Error;
use crate::escape::escape_path;
use crate::image::OpenedFile;
use instar_guest_abi::ErrorCode;
use rustix::fs::fstatfs;

/// `f_type` (statfs(2), `linux/magic.h`) of file systems that write what is overwritten to another place of the disk.
const WRITES_ELSEWHERE: [(u64, &str); 5] =
    [(0x9123_683e, "btrfs"), (0xca45_1a4e, "bcachefs"), (0x2fc1_2fc1, "ZFS"), (0xf2f5_2010, "F2FS"), (0x3434, "NILFS")];

/// Refuse to wipe in a commit that empties nothing, or makes nothing durable.
///
/// # Errors
/// [`ErrorCode::BadUsage`], or another obstacle.
pub fn admit(request: &CommitRequest, parts: &Parts<'_, '_>) -> Result<(), Error> {
    if request.cache == Cache::Unsafe {
        let message =
            "--wipe promises that what is overwritten is durable, and -t unsafe flushes nothing: use another mode";
        return Err(Error::new(ErrorCode::BadUsage, message));
    }
    if parts.empties {
        return Ok(());
    }
    let clause = if parts.between.is_empty() {
        "keeps its content with -d, so that there is nothing to wipe: leave out the one or the other"
    } else {
        "keeps its content, because layers between it and the target are merged with it, so that there is nothing to wipe: \
         commit one layer at a time"
    };
    Err(Error::image(&parts.overlay.opened.path, ErrorCode::BadUsage, clause))
}

/// The line about an overlay on a file system that would keep the overwritten data.
pub fn warning(parts: &Parts<'_, '_>) -> Option<String> {
    let (file, system) = parts.overlay.all_files().find_map(|file| Some((file, writes_elsewhere(file)?)))?;
    Some(format!(
        "'{}' lies on {system}, which writes zeroes to another place than the data that they are to overwrite: --wipe does not \
         remove it from the disk",
        escape_path(&file.path)
    ))
}

/// The name of such a file system.
fn writes_elsewhere(file: &OpenedFile) -> Option<&'static str> {
    let found = fstatfs(file.file.file()).ok().filter(|_| !file.block_device)?.f_type.cast_unsigned();
    WRITES_ELSEWHERE.iter().find(|(magic, _)| *magic == found).map(|(_, name)| *name)
}
