//! Locking the images: waiting for other users, and the message if they do not finish in time.

use super::access::Access;
use super::loop_users::{remember_loops, used_through};
use super::named::NamedFile;
use super::users::{remember_users, user_of, User};
use crate::cancel::Cancel;
use crate::devices::lock::{lock_read_only, lock_read_write, LockError};
use crate::error::Error;
use crate::lookup::Directory;
use instar_guest_abi::ErrorCode;
use rustix::fs::fstat;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// How long each wait is before a lock is tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// How long to wait for all locks together: in seconds, until when, and who may end that.
static PATIENCE: Mutex<Option<(u64, Instant, Cancel)>> = Mutex::new(None);

/// What a running virtual machine can do itself instead of the command.
static INSTEAD: OnceLock<&'static str> = OnceLock::new();

/// Prepare locking before the process is confined: wait for images in use from now on, for `wait` seconds altogether, and find
/// out who uses these files, those beside them, and those in the `allowed` directories, while the process may still look
/// around. `instead` is what to do inside a virtual machine that runs, if it can do what the command does.
pub fn prepare_to_lock<'p>(
    cancel: &Cancel,
    wait: u64,
    instead: Option<&'static str>,
    files: impl IntoIterator<Item = &'p NamedFile>,
    allowed: &'p [PathBuf],
) {
    // The process works for one command, which it is confined for: there is one end for all waits.
    let until = Instant::now().checked_add(Duration::from_secs(wait)).filter(|_| wait > 0);
    if let Ok(mut patience) = PATIENCE.lock() {
        *patience = until.map(|until| (wait, until, cancel.clone()));
    }
    if let Some(instead) = instead {
        let _ = INSTEAD.set(instead);
    }
    let files: Vec<&NamedFile> = files.into_iter().collect();
    let beside = files.iter().filter_map(|file| file.directory()).map(Directory::path);
    let directories = beside.chain(allowed.iter().map(PathBuf::as_path));
    remember_users(files.iter().map(|file| file.path()), directories);
    remember_loops();
}

/// Refuse a file that was in use through a loop device when [`prepare_to_lock`] looked, in a way that this access does not
/// bear.
///
/// # Errors
/// [`ErrorCode::ImageInUse`].
pub fn refuse_used_through_loop(file: &File, path: &Path, access: Access) -> Result<(), Error> {
    match fstat(file).ok().and_then(|stat| used_through(&stat, access)) {
        None => Ok(()),
        Some(device) => {
            let clause = format!("is in use by way of {device}, which is mounted or has another user: unmount it");
            Err(Error::image(path, ErrorCode::ImageInUse, clause))
        }
    }
}

/// Lock a file as QEMU does, so that no virtual machine and no other tool uses it in a way that conflicts.
///
/// # Errors
/// [`ErrorCode::ImageInUse`]; [`ErrorCode::Interrupted`] when a signal ends the wait; [`ErrorCode::OpenFailed`] when the file
/// system fails.
pub(super) fn lock(file: &File, path: &Path, access: Access) -> Result<(), Error> {
    refuse_used_through_loop(file, path, access)?;
    let patience = PATIENCE.lock().ok().and_then(|patience| patience.clone());
    loop {
        let locked = match access {
            Access::ReadWrite => lock_read_write(file),
            Access::ReadOnly => lock_read_only(file),
            Access::Shared => Ok(()),
        };
        match locked {
            Ok(()) => return Ok(()),
            Err(LockError::Failed(byte, error)) => {
                let clause = format!("cannot be locked: byte {byte}: {error}");
                return Err(Error::image(path, ErrorCode::OpenFailed, clause));
            }
            Err(LockError::Needed(_) | LockError::Shared(_)) => {}
        }
        match &patience {
            Some((_, until, cancel)) if Instant::now() < *until => {
                pause();
                if cancel.is_cancelled() {
                    let clause = "interrupted while waiting for the process that uses it";
                    return Err(Error::image(path, ErrorCode::Interrupted, clause));
                }
            }
            _ => {
                let user = user_of(file);
                let clause = in_use(user, access, patience.as_ref().map(|(seconds, ..)| *seconds));
                let error = Error::image(path, ErrorCode::ImageInUse, clause);
                return Err(error.held_by(user.map(|user| user.process)));
            }
        }
    }
}

/// Wait a little, or until a signal comes: the sleep of the standard library goes on after one.
fn pause() {
    let pause = rustix::thread::Timespec { tv_sec: 0, tv_nsec: PAUSE.subsec_nanos().into() };
    let _ = rustix::thread::nanosleep(&pause);
}

/// Who uses a file, and what to do: one clause.
fn in_use(user: Option<&User>, access: Access, patience: Option<u64>) -> String {
    let who = user.map_or_else(
        || "perhaps a running virtual machine".to_owned(),
        |User { name, process, .. }| format!("{name}, process {process}"),
    );
    let waited = patience.map(|seconds| format!(" after {seconds} s")).unwrap_or_default();
    let still = if patience.is_some() { "still " } else { "" };
    let wait = if patience.is_none() { ", or wait with --wait SECONDS" } else { "" };
    match access {
        Access::ReadWrite => {
            let instead = INSTEAD.get().map(|instead| format!("; while a virtual machine runs, {instead}"));
            format!("is {still}in use by another process ({who}){waited}: stop it{wait}{}", instead.unwrap_or_default())
        }
        Access::ReadOnly | Access::Shared => {
            format!("is {still}being changed by another process ({who}){waited}: stop it{wait}")
        }
    }
}
