//! Space in the file: what becomes of that of zeroes which are written only so that they have their place in an image, and
//! what is reserved before the first change, so that a disk cannot run full in the middle.

use super::{retry, zero, Device, Devices};
use rustix::fs::FallocateFlags;
use std::io;

/// The fewest bytes of zeroes that are worth a look. Tables of a format may be as short, and read the same.
pub const WORTH: u64 = 4096;

/// What becomes of the space of zeroes that are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroWrites {
    /// They are written like anything else.
    #[default]
    Written,
    /// The file system reserves it.
    Reserved,
    /// They take none: the file gets holes there.
    Holes,
}

impl Device {
    /// Have a range read as zeroes, the file be as long as that, and the space be reserved or not. `false` if the file system
    /// cannot reserve any: then they have to be written.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn take_zeroes(&mut self, way: ZeroWrites, offset: u64, length: u64) -> io::Result<bool> {
        let (end, now) = (offset.saturating_add(length), self.file.metadata()?.len());
        if self.fixed_length || self.direct.is_some() || way == ZeroWrites::Written {
            return Ok(false);
        }
        if way == ZeroWrites::Holes {
            if end > now {
                self.set_length(end)?;
            }
            self.zero(offset, length, false)?;
            return Ok(true);
        }
        // A hole is a hole also once there is space for it. What has bytes by now has to lose them.
        let is_empty = offset >= now || self.reads_as_zero(offset, length);
        let flags = if is_empty { FallocateFlags::empty() } else { FallocateFlags::ZERO_RANGE };
        self.note_data(offset, length);
        match retry(|| rustix::fs::fallocate(&self.file, flags, offset, length)) {
            Ok(()) => Ok(true),
            Err(error) if zero::is_refusal(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Devices {
    /// Have the file system reserve the next `bytes` bytes behind the end of a device's file, which stays as long as it is and
    /// reads as before. Without effect on a block device, and where the file system cannot reserve any or fails to.
    ///
    /// # Errors
    /// There is not so much space: `ENOSPC`, `EDQUOT`. A part may be reserved then, which
    /// [`release_behind`](Self::release_behind) gives back.
    pub fn reserve_behind(&self, number: u32, bytes: u64) -> io::Result<()> {
        let Some(device) = self.device(number).filter(|device| !device.fixed_length && bytes > 0) else {
            return Ok(());
        };
        let Ok(end) = device.file.metadata().map(|found| found.len()) else { return Ok(()) };
        match retry(|| rustix::fs::fallocate(&device.file, FallocateFlags::KEEP_SIZE, end, bytes)) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => Err(error),
            // The writes will say whether they fail.
            _ => Ok(()),
        }
    }

    /// Give back what is reserved behind the end of a device's file. That it fails is no matter: the space goes with the next
    /// change of the length.
    pub fn release_behind(&self, number: u32) {
        let Some(device) = self.device(number).filter(|device| !device.fixed_length) else { return };
        // A file that is cut where it ends gives back what is behind that (ext4, XFS, btrfs, tmpfs); a hole there does not.
        let _ = device.file.metadata().and_then(|found| device.file.set_len(found.len()));
    }
}
