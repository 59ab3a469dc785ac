//! An existing target (`-n`): it is written in place, so a failure leaves a part of the disk in it.

use crate::bytes::Bytes;
use crate::error::Error;
use crate::image::{parent_is_unrecorded, Access, ChainImage, NamedFile, OpenedFile};
use crate::lookup::Identity;
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;
use rustix::fs::{openat, Mode, OFlags};
use rustix::io::{retry_on_intr, Errno};
use std::os::fd::OwnedFd;
use std::path::Path;

/// The target, open before the process confines itself.
#[derive(Debug)]
pub struct Existing {
    opened: OpenedFile,
    /// The claim that keeps a block device from being mounted meanwhile.
    claim: Option<OwnedFd>,
}

impl Existing {
    /// Open it for reading and writing.
    ///
    /// # Errors
    /// [`ErrorCode::ImageNotFound`]; [`ErrorCode::ImageInUse`] for a device that is mounted or part of another device;
    /// errors of opening.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let named = NamedFile::new(path);
        let opened = named.open(Access::ReadWrite, ErrorCode::ImageNotFound)?;
        let claim = match named.directory().filter(|_| named.is_block_device()) {
            None => None,
            Some(directory) => {
                // Without O_CREAT it says of a block device that nobody has it mounted (open(2)).
                let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
                let claimed = retry_on_intr(|| openat(directory, named.name(), flags, Mode::empty()));
                Some(claimed.map_err(|errno| in_use(path, errno))?)
            }
        };
        Ok(Self { opened, claim })
    }

    /// Its identity, and that of the file below a loop device.
    pub fn identity(&self) -> (Identity, Option<Identity>) {
        (self.opened.identity, self.opened.below)
    }

    /// Lock the target, and probe it: it has to be a stand-alone image of this format, in one file, with a disk of at
    /// least `size` bytes. Also returns the claim to a device, which has to outlive the use of the image.
    ///
    /// # Errors
    /// [`ErrorCode::ImageInUse`], [`ErrorCode::UnsupportedFormat`], and errors of probing.
    pub fn identify<'r>(
        self,
        registry: &'r Registry,
        format: &str,
        size: u64,
    ) -> Result<(ChainImage<'r>, Option<OwnedFd>), Error> {
        let target = self.opened.lock(Access::ReadWrite)?.identify_as(registry, Some(format), "-O")?;
        let path = &target.opened.path;
        let refused = |clause: String| Err(Error::image(path, ErrorCode::UnsupportedFormat, clause));
        let failed = |error| Error::plugin(path, &error);
        if target.facts.backing.is_some() && !parent_is_unrecorded(&target.facts) {
            return refused("has a backing file, and -n writes into images that stand alone: leave out -n".into());
        }
        if !target.plugin.files(&target.opened.file).map_err(failed)?.is_empty() {
            return refused("is an image in several files, and -n writes into images in one file: leave out -n".into());
        }
        let has = target.facts.virtual_size;
        if has < size {
            return refused(format!(
                "has a disk of {}, and one of {} is converted: resize it first",
                Bytes(has),
                Bytes(size)
            ));
        }
        Ok((target, self.claim))
    }
}

fn in_use(path: &Path, errno: Errno) -> Error {
    match errno {
        Errno::BUSY => {
            let clause = "is a block device that is in use: unmount it, or stop what stands on it";
            Error::image(path, ErrorCode::ImageInUse, clause)
        }
        _ => Error::io(path, ErrorCode::OpenFailed, "cannot be opened", &errno.into()),
    }
}
