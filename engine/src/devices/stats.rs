//! What the devices did, for `-v`.

/// Bytes by the way they went, and flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoStats {
    /// Bytes read into guest memory.
    pub guest_read: u64,
    /// Bytes written from guest memory.
    pub guest_written: u64,
    /// Bytes that the kernel copied between files (or shared, where the file system can).
    pub kernel_copied: u64,
    /// Bytes that were copied through memory of the host process.
    pub host_copied: u64,
    /// Bytes that were made to read as zero, or given back.
    pub zeroed: u64,
    /// Flushes that reached the file system.
    pub flushes: u64,
    /// Flushes that had nothing to do, or were ignored because of the cache mode.
    pub flushes_skipped: u64,
    /// System calls that moved data.
    pub calls: u64,
}
