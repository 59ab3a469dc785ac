//! What was moved, and how.

use std::fmt;

/// Bytes by the way they took, and flushes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes read into the guest.
    pub read: u64,
    /// Bytes written from the guest.
    pub written: u64,
    /// Bytes that were not moved at all: both files share them on the disk.
    pub shared: u64,
    /// Bytes copied within the kernel.
    pub copied_in_kernel: u64,
    /// Bytes copied through this process.
    pub copied_through_host: u64,
    /// Bytes made zero, or given back.
    pub zeroed: u64,
    /// Bytes overwritten with zeroes before they were given back.
    pub overwritten: u64,
    /// Flushes that had something to flush.
    pub flushes: u64,
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes read and {} written by the guest, {} shared, {} copied in the kernel, {} through the host, {} zeroed or \
             given back, {} flushes",
            self.read, self.written, self.shared, self.copied_in_kernel, self.copied_through_host, self.zeroed, self.flushes
        )?;
        if self.overwritten > 0 {
            write!(f, ", {} overwritten", self.overwritten)?;
        }
        Ok(())
    }
}
