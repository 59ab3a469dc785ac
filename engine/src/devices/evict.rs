//! Eviction of the host's page cache, so that a read comes from the disk.

use super::Devices;
use rustix::fs::{fadvise, Advice};

impl Devices {
    /// Make the next read of these devices come from the disk, as far as the host can: drop the page cache of their files, and
    /// forget the known holes. Unflushed data stays in the page cache (`posix_fadvise(2)`, `POSIX_FADV_DONTNEED`), so flush
    /// first. File systems in memory keep everything there, and network file systems and disks have their own caches.
    pub fn evict_page_cache(&self, numbers: impl IntoIterator<Item = u32>) {
        for device in numbers.into_iter().filter_map(|number| self.device(number)) {
            device.zeroes.borrow_mut().forget(0, u64::MAX);
            // It changes nothing that is read, only from where: without it, a file system that cannot do this is still read.
            let _ = fadvise(&device.file, 0, None, Advice::DontNeed);
        }
    }
}
