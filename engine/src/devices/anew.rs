//! Reading what is on the disk, and not what the host keeps of it in memory.

use super::Devices;
use rustix::fs::{fadvise, Advice};

impl Devices {
    /// Have the next read of these devices come from the disk, as far as the host can tell: what the page cache has of their
    /// files is dropped, and what was found out of their holes is forgotten. What is not flushed stays in the page cache
    /// (`posix_fadvise(2)`, `POSIX_FADV_DONTNEED`): flush first. File systems in memory have nothing else, and network file
    /// systems and disks have caches of their own.
    pub fn read_anew(&self, numbers: impl IntoIterator<Item = u32>) {
        for device in numbers.into_iter().filter_map(|number| self.device(number)) {
            device.zeroes.borrow_mut().forget(0, u64::MAX);
            // It changes nothing that is read, only from where: without it, a file system that cannot do this is still read.
            let _ = fadvise(&device.file, 0, None, Advice::DontNeed);
        }
    }
}
