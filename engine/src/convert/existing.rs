//! An existing target (`-n`): it is written in place, so a failure leaves a part of the disk in it.

use crate::bytes::Bytes;
use crate::error::Error;
use crate::escape::shell_path;
use crate::image::{parent_is_unrecorded, Access, ChainImage, NamedFile, OpenedFile};
use crate::lookup::Identity;
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;
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
        Ok(Self { opened, claim: named.claim()? })
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
        let opened = self.opened.lock(Access::ReadWrite)?;
        let (path, device) = (opened.path.clone(), opened.block_device);
        let target = opened.identify_as(registry, Some(format), "-O").map_err(|error| match error.code {
            ErrorCode::FormatMismatch if device => {
                error.in_state(&format!("if it holds no image, {}", make(format, &path)))
            }
            _ => error,
        })?;
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
            let (has, size) = (Bytes(has), Bytes(size));
            let advice =
                if device && format == "raw" { "enlarge the device, or take a larger one" } else { "resize it first" };
            return refused(format!("has a disk of {has}, and one of {size} is converted: {advice}"));
        }
        Ok((target, self.claim))
    }
}

/// Refuse a block device as a new image: one that is in use, too, because -n would refuse that next.
///
/// # Errors
/// [`ErrorCode::ImageInUse`] and [`ErrorCode::OpenFailed`].
pub fn refuse_device(path: &Path, format: &str) -> Result<(), Error> {
    if NamedFile::new(path).claim()?.is_none() {
        return Ok(());
    }
    let advice = if format == "raw" { "-n writes into it, in place".to_owned() } else { make(format, path) };
    Err(Error::image(path, ErrorCode::OpenFailed, format!("is a block device, and no new image: {advice}")))
}

/// How an image of a format comes onto a block device.
fn make(format: &str, path: &Path) -> String {
    let path = shell_path(path);
    format!("make an empty image on it with `instar create -f {format} {path} SIZE`, and convert into that with -n")
}
