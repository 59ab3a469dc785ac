//! The memory of the guest.

use instar_guest_abi::GUEST_MEMORY_SIZE;
use std::fs::File;
use std::io;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// Size of a large page in bytes.
pub const LARGE_PAGE: u64 = 2 << 20;

/// The memory of the guest, aligned to large pages. Addresses are the guest's.
#[derive(Debug)]
pub struct GuestRam {
    region: MmapRegion,
    /// Where in the region address 0 is.
    start: usize,
}

impl GuestRam {
    /// Memory of this process alone, zeroed.
    ///
    /// # Errors
    /// There is none.
    pub fn new() -> io::Result<Self> {
        let (size, large) = (to_usize(GUEST_MEMORY_SIZE), to_usize(LARGE_PAGE));
        let region = MmapRegion::<()>::new(size + large).map_err(reason)?;
        let start = region.as_ptr().align_offset(large);
        if start > large {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        }
        let ram = Self { region, start };
        // SAFETY: the range was mapped above and belongs to this object; the advice changes no content. If large
        // pages are not granted, the guest is only slower.
        unsafe { libc::madvise(ram.host_address() as *mut libc::c_void, size, libc::MADV_HUGEPAGE) };
        Ok(ram)
    }

    /// Memory that is this file, which has the size of the guest's memory: another process may map it, too.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub fn of_file(file: File) -> io::Result<Self> {
        let size = to_usize(GUEST_MEMORY_SIZE);
        let region = MmapRegion::<()>::from_file(FileOffset::new(file, 0), size).map_err(reason)?;
        Ok(Self { region, start: 0 })
    }

    /// Where address 0 of the guest is in this process.
    pub fn host_address(&self) -> u64 {
        self.region.as_ptr() as u64 + self.start as u64
    }

    /// The memory `address..address + length`.
    pub fn slice(&self, address: u64, length: u64) -> Option<VolatileSlice<'_>> {
        let end = address.checked_add(length)?;
        if end > GUEST_MEMORY_SIZE {
            return None;
        }
        self.region.get_slice(self.start + to_usize(address), to_usize(length)).ok()
    }

    /// Copy `data` to `address`; `false` if it does not fit.
    #[must_use]
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.slice(address, data.len() as u64) {
            Some(slice) => {
                slice.copy_from(data);
                true
            }
            None => false,
        }
    }

    /// Fill `data` from `address`; `false` if that is not all memory.
    #[must_use]
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.slice(address, data.len() as u64) {
            Some(slice) => slice.copy_to(data) == data.len(),
            None => false,
        }
    }

    /// The number at `address`.
    pub fn read_u64(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes).then(|| u64::from_le_bytes(bytes))
    }
}

fn reason(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(error) => error,
        other => io::Error::other(other),
    }
}

#[allow(clippy::cast_possible_truncation, reason = "x86-64 only, and addresses are checked")]
const fn to_usize(value: u64) -> usize {
    value as usize
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_guest_memory_is_reachable() {
        let ram = GuestRam::new().unwrap();
        assert_eq!(ram.host_address() % LARGE_PAGE, 0);
        assert!(ram.write(GUEST_MEMORY_SIZE - 4, b"last"));
        let mut back = [0; 4];
        assert!(ram.read(GUEST_MEMORY_SIZE - 4, &mut back));
        assert_eq!(&back, b"last");
        assert!(!ram.write(GUEST_MEMORY_SIZE - 3, b"last"));
        assert!(ram.slice(u64::MAX, 2).is_none());
        assert!(ram.slice(GUEST_MEMORY_SIZE, 0).is_some());
        assert_eq!(ram.read_u64(GUEST_MEMORY_SIZE - 7), None);
    }
}
