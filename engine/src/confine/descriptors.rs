//! Descriptors that the caller left open: closed at the start, so that a process which an image has taken over finds none.
//!
//! The standard ones stay: output and errors are printed there. Standard input is never read, and becomes `/dev/null`. What
//! the [filter](super::calls) lets a confined process do with the standard ones is to print.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;

/// The first descriptor that is not a standard one.
const FIRST: RawFd = 3;
/// Without `close_range` and `/proc`: descriptors up to this one are closed.
const MANY: RawFd = 1 << 16;
/// Names of descriptors, in front of the number.
const PREFIXES: [&[u8]; 3] = [b"/proc/self/fd/", b"/dev/fd/", b"--progress=fd:"];

/// Close every descriptor that the process inherited, except the standard ones and those that an argument names
/// (`/dev/fd/N`, `/proc/self/fd/N`, `--progress=fd:N`): these are handed over on purpose. Standard input is replaced by `/dev/null`, unless
/// an argument names it.
///
/// # Safety
/// Nothing in this process may own a descriptor yet: call it first in `main`.
pub unsafe fn close_inherited(arguments: impl IntoIterator<Item = OsString>) {
    let mut kept: Vec<RawFd> = arguments.into_iter().filter_map(|argument| named(&argument)).collect();
    kept.sort_unstable();
    kept.dedup();
    if !kept.contains(&0) {
        // SAFETY: the name is a C string. Standard input is replaced as one step, and nothing reads from it.
        unsafe {
            let nothing = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
            if nothing >= 0 {
                libc::dup2(nothing, libc::STDIN_FILENO);
                libc::close(nothing);
            }
        }
    }
    let mut first = FIRST;
    for &descriptor in kept.iter().filter(|&&descriptor| descriptor >= FIRST) {
        close_between(first, descriptor - 1);
        first = descriptor.saturating_add(1);
    }
    close_between(first, RawFd::MAX);
}

/// The descriptor that an argument names: alone, or behind an option.
fn named(argument: &OsStr) -> Option<RawFd> {
    let argument = argument.as_bytes();
    if argument.ends_with(b"/dev/stdin") {
        return Some(0);
    }
    PREFIXES.iter().find_map(|prefix| {
        let at = argument.windows(prefix.len()).position(|window| window == *prefix)?;
        std::str::from_utf8(&argument[at + prefix.len()..]).ok()?.parse().ok().filter(|&number: &RawFd| number >= 0)
    })
}

/// Close the descriptors from `first` to `last`.
fn close_between(first: RawFd, last: RawFd) {
    if first > last {
        return;
    }
    // SAFETY: it has no pointers; that nobody owns these descriptors is the caller's promise.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0;
    if !closed {
        // Linux before 5.9, or a container that does not know the call.
        close_each(first, last);
    }
}

/// The same, one by one.
fn close_each(first: RawFd, last: RawFd) {
    let open: Vec<RawFd> = match std::fs::read_dir("/proc/self/fd") {
        Ok(entries) => entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect(),
        Err(_) => (first..=last.min(MANY)).collect(),
    };
    for descriptor in open.into_iter().filter(|descriptor| (first..=last).contains(descriptor)) {
        // SAFETY: as above. The directory's own descriptor is closed already.
        unsafe { libc::close(descriptor) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_that_arguments_name() {
        for (argument, expected) in [
            ("/dev/fd/5", Some(5)),
            ("/proc/self/fd/12", Some(12)),
            ("--base=/dev/fd/7", Some(7)),
            ("-b/proc/self/fd/7", Some(7)),
            ("--progress=fd:4", Some(4)),
            ("--progress=fd:x", None),
            ("/dev/stdin", Some(0)),
            ("/dev/fd/", None),
            ("/dev/fd/x", None),
            ("/dev/fd/-1", None),
            ("/dev/fd/99999999999", None),
            ("disk.qcow2", None),
        ] {
            assert_eq!(named(OsStr::new(argument)), expected, "{argument}");
        }
    }
}
