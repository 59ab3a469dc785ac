//! Landlock for a process that needs nothing: no file, no network, no signals to others (`linux/landlock.h`, landlock(7)).

use crate::calls::{call3, number, Errno};
use core::mem::{offset_of, size_of};

/// `struct landlock_ruleset_attr`, as of version 6.
#[repr(C)]
struct Ruleset {
    files: u64,
    network: u64,
    scoped: u64,
}

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const ASK_VERSION: usize = 1;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const EOPNOTSUPP: u32 = 95;

/// All accesses that this version of Landlock knows.
const fn files(version: usize) -> u64 {
    let count = match version {
        0 | 1 => 13,
        2 => 14,
        3 | 4 => 15,
        5..=8 => 16,
        _ => 17,
    };
    (1 << count) - 1
}

/// Deny this process everything that Landlock can deny. Returns its version, 0 where the kernel has none, or the process may not
/// ask for it: the kernel itself never answers so, but the filter of a container engine that does not know Landlock does.
///
/// # Errors
/// The kernel has one, which cannot be used.
pub fn restrict() -> Result<usize, Errno> {
    // SAFETY: it has no pointers.
    let version = match unsafe { call3(number::LANDLOCK_CREATE_RULESET, 0, 0, ASK_VERSION) } {
        Ok(version) => version,
        Err(Errno(EPERM | ENOSYS | EOPNOTSUPP)) => return Ok(0),
        Err(error) => return Err(error),
    };
    let (tcp, scopes) = (0b11, 0b11);
    let ruleset = Ruleset { files: files(version), network: tcp, scoped: scopes };
    // An older kernel takes a longer structure only if what it does not know is 0.
    let size = match version {
        0..=3 => offset_of!(Ruleset, network),
        4 | 5 => offset_of!(Ruleset, scoped),
        _ => size_of::<Ruleset>(),
    };
    // SAFETY: the structure is valid for the call, which reads `size` bytes of it.
    unsafe {
        let descriptor = call3(number::LANDLOCK_CREATE_RULESET, (&raw const ruleset) as usize, size, 0)?;
        call3(number::LANDLOCK_RESTRICT_SELF, descriptor, 0, 0)?;
        call3(number::CLOSE, descriptor, 0, 0)?;
    }
    Ok(version)
}
