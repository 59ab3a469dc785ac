//! Copies of a disk that fails in places (`--salvage`): a sector that cannot be read is zero in the copy.

use super::Device;
use std::io;
use std::ops::Range;

/// Bytes that are given up at once.
const SECTOR: usize = 512;
/// Ranges that are kept, for messages; of those that follow, only the bytes are counted.
const MOST: usize = 1000;

/// The ranges that could not be read.
#[derive(Debug, Default)]
pub struct Salvaged {
    ranges: Vec<Range<u64>>,
    bytes: u64,
}

impl Salvaged {
    /// The ranges, and all bytes.
    pub fn found(&self) -> (Vec<Range<u64>>, u64) {
        (self.ranges.clone(), self.bytes)
    }

    fn note(&mut self, at: u64, length: u64) {
        self.bytes = self.bytes.saturating_add(length);
        let full = self.ranges.len() >= MOST;
        match self.ranges.last_mut() {
            Some(last) if last.end == at => last.end = at.saturating_add(length),
            _ if full => {}
            _ => self.ranges.push(at..at.saturating_add(length)),
        }
    }
}

/// Read `bytes` at `offset` of a device sector by sector, after a larger read failed with `error`, and substitute zeroes for
/// each sector that fails. Bytes past the end of the file are zeroes.
///
/// # Errors
/// `error`, if the device is not to be salvaged.
pub fn read(device: &Device, offset: u64, bytes: &mut [u8], error: io::Error) -> io::Result<()> {
    let Some(salvaged) = &device.salvage else { return Err(error) };
    let mut at = offset;
    let first = SECTOR - usize::try_from(offset % SECTOR as u64).unwrap_or(0);
    let (head, rest) = bytes.split_at_mut(first.min(bytes.len()));
    for sector in std::iter::once(head).chain(rest.chunks_mut(SECTOR)) {
        if device.read_padded(at, sector).is_err() {
            sector.fill(0);
            salvaged.borrow_mut().note(at, sector.len() as u64);
        }
        at = at.saturating_add(sector.len() as u64);
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
mod tests {
    use super::*;
    use std::fs::File;

    /// The kernel reads no page of a process that is not mapped: EIO.
    fn device() -> (Device, u64) {
        let page = vec![7u8; 16384];
        let start = (page.as_ptr() as u64).next_multiple_of(4096);
        std::mem::forget(page);
        let file = File::open("/proc/self/mem").unwrap();
        (Device::new(file, false, i64::MAX as u64, 0, true), start)
    }

    #[test]
    fn what_cannot_be_read_is_zero_and_noted() {
        let (mut device, start) = device();
        let mut bytes = [9u8; 1000];
        let failed = || io::Error::from_raw_os_error(libc::EIO);
        read(&device, 100, &mut bytes, failed()).unwrap_err();
        device.salvage = Some(Default::default());
        read(&device, 100, &mut bytes, failed()).unwrap();
        assert_eq!((bytes, device.salvaged()), ([0; 1000], (vec![100..1100], 1000)));
        read(&device, 4096, &mut bytes, failed()).unwrap();
        read(&device, start, &mut bytes, failed()).unwrap();
        assert_eq!((bytes, device.salvaged()), ([7; 1000], (vec![100..1100, 4096..5096], 2000)));
    }
}
