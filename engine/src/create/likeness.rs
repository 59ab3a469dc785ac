//! What a file has besides its content.

use crate::escape::escape_bytes;
use rustix::fs::{fchmod, fchown, fgetxattr, flistxattr, fremovexattr, fsetxattr, fstat, Gid, Mode, Uid, XattrFlags};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::fs::File;

/// Bytes of an extended attribute, and of the list of their names, at most (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MOST: usize = 64 << 10;

/// Give a file owner, mode, and extended attributes of the one whose place it takes: access lists and labels are some of them. The
/// attributes `but` stay behind.
///
/// # Errors
/// One clause that says what it cannot have.
pub fn look_like(old: &File, new: &File, but: &[&CStr]) -> Result<(), String> {
    let lost = |what: &str| {
        let what = what.to_owned();
        move |errno: Errno| format!("cannot have its {what}: {}", crate::error::reason(&errno.into()))
    };
    let (stat, own) = (fstat(old).map_err(lost("mode"))?, fstat(new).map_err(lost("mode"))?);
    if (stat.st_uid, stat.st_gid) != (own.st_uid, own.st_gid) {
        let owner = (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
        fchown(new, owner.0, owner.1).map_err(lost("owner"))?;
    }
    fchmod(new, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(lost("mode"))?;
    let mut wanted = attributes(old).map_err(lost("extended attributes"))?;
    wanted.retain(|name| !but.contains(&name.as_c_str()));
    // What the directory gives to every new file.
    for name in attributes(new).map_err(lost("extended attributes"))? {
        if !wanted.contains(&name) {
            fremovexattr(new, name.as_c_str()).map_err(lost("extended attributes"))?;
        }
    }
    for name in wanted {
        let shown = escape_bytes(name.to_bytes()).to_string();
        let value = attribute(old, &name).map_err(lost(&shown))?;
        if attribute(new, &name).is_ok_and(|has| has == value) {
            continue;
        }
        fsetxattr(new, name.as_c_str(), &value, XattrFlags::empty()).map_err(lost(&shown))?;
    }
    // An access list changes the mode, and the other way round.
    let now = fstat(new).map_err(lost("mode"))?;
    if now.st_mode & 0o7777 != stat.st_mode & 0o7777 {
        return Err("cannot have its mode".to_owned());
    }
    Ok(())
}

/// The names of a file's extended attributes.
fn attributes(file: &File) -> Result<Vec<CString>, Errno> {
    let mut list = vec![0_u8; MOST];
    let length = match flistxattr(file, &mut list[..]) {
        // A file system without them.
        Err(Errno::OPNOTSUPP) => 0,
        other => other?,
    };
    let names = list.get(..length).unwrap_or_default().split_inclusive(|&byte| byte == 0);
    Ok(names.filter_map(|name| CStr::from_bytes_with_nul(name).ok()).map(CStr::to_owned).collect())
}

fn attribute(file: &File, name: &CStr) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0_u8; MOST];
    let length = fgetxattr(file, name, &mut value[..])?;
    value.truncate(length);
    Ok(value)
}
