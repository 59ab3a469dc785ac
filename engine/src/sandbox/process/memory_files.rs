//! Files in memory (`memfd_create(2)`) that two processes share.

use super::unusable;
use crate::sandbox::error::SandboxError;
use instar_guest_abi::GUEST_MEMORY_SIZE;
use rustix::fs::{fcntl_add_seals, ftruncate, memfd_create, MemfdFlags, SealFlags};
use rustix::io::{fcntl_dupfd_cloexec, Errno};
use rustix::process::{getrlimit, Resource};
use std::ffi::CStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

/// The lowest number of a descriptor that is handed over: above those that the starter finds its own at.
const FIRST_FREE: i32 = 10;

/// A file in memory. Linux before 6.3 does not know the flag that says whether it may be executed.
fn create(name: &CStr, purpose: MemfdFlags) -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match memfd_create(name, flags | purpose) {
        Err(Errno::INVAL) => memfd_create(name, flags),
        other => other,
    }?;
    // The first descriptors are those of the new process.
    above_the_first(file)
}

/// The same file with a descriptor that is none of the new process's.
///
/// # Errors
/// There are no more descriptors: also where the limit lies below these numbers, which the kernel calls an invalid argument.
pub fn above_the_first(file: OwnedFd) -> Result<OwnedFd, Errno> {
    fcntl_dupfd_cloexec(file, FIRST_FREE).map_err(|error| if error == Errno::INVAL { Errno::MFILE } else { error })
}

fn failed(what: &'static str) -> impl Fn(Errno) -> SandboxError {
    move |error| unusable(what, error.raw_os_error())
}

/// A file of the guest's memory, or its text, whose offsets are the guest's addresses. Its length never changes.
///
/// # Errors
/// There is no memory, or no such files.
pub fn guest(name: &CStr) -> Result<File, SandboxError> {
    // Asked before: to go beyond the limit raises a signal, which ends a process that does not ignore it.
    if getrlimit(Resource::Fsize).current.is_some_and(|most| most < GUEST_MEMORY_SIZE) {
        return Err(unusable("ftruncate of a file in memory", libc::EFBIG));
    }
    let file = create(name, MemfdFlags::NOEXEC_SEAL).map_err(failed("memfd_create"))?;
    ftruncate(&file, GUEST_MEMORY_SIZE).map_err(failed("ftruncate of a file in memory"))?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).map_err(failed("sealing a file in memory"))?;
    Ok(file.into())
}

/// From now on, nobody changes this file, and its seals neither.
///
/// # Errors
/// The kernel refuses.
pub fn seal(file: &File) -> Result<(), SandboxError> {
    fcntl_add_seals(file.as_fd(), SealFlags::WRITE | SealFlags::SEAL).map_err(failed("sealing the guest's text"))
}

/// A program.
///
/// # Errors
/// The kernel makes no files in memory that can be executed: `vm.memfd_noexec` is 2.
pub fn program(name: &CStr, content: &[u8]) -> Result<File, SandboxError> {
    let file =
        create(name, MemfdFlags::EXEC).map_err(failed("memfd_create of a program (see `sysctl vm.memfd_noexec`)"))?;
    let mut file = File::from(file);
    file.write_all(content).map_err(|error| unusable("writing a program", error.raw_os_error().unwrap_or(0)))?;
    Ok(file)
}
