//! Zeroes that are written only so that they have their place in an image: what becomes of their space in the file.

use super::{retry, zero, Device};
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
