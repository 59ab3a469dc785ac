//! The refusals of a commit that does not begin.

use crate::error::{Error, Role};
use crate::escape::escape_path;
use instar_guest_abi::ErrorCode;
use std::path::Path;

/// The error for steps of an operation in the wrong order: a bug of this program.
pub fn nothing_to_commit() -> Error {
    Error::new(ErrorCode::InternalOverflow, "a commit without an overlay and a target: please report this")
}

/// The line of a dry run about a file that a commit could not write.
pub fn not_writable(path: &Path) -> Option<String> {
    use rustix::fs::{accessat, Access, AtFlags, CWD};
    let error = accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).err()?;
    let (path, why) = (escape_path(path), crate::error::reason(&error.into()));
    Some(format!("'{path}': you may not write to it, which the commit itself needs: {why}"))
}

/// The refusal of an image that was named as a child, and is another child of the backing.
pub fn is_sibling(path: &Path, backing: &Path) -> Error {
    let clause = format!(
        "is backed by '{}', and not by the overlay, and would read something else after the commit: leave it out of --relink, \
         and copy it first if it is needed; if an interrupted run of this very command had it name that, use --ignore-siblings",
        escape_path(backing)
    );
    Error::image(path, ErrorCode::NotInChain, clause).in_role(Role::Child)
}
