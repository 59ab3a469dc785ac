//! What was wrong with disks of which everything was read that can be: the parts that are compressed and do not decode, and
//! damage of metadata.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use instar_guest_protocol::commit::{Ignored, Undecoded};
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{DriverError, DriverResult};

/// Parts that are told one by one. What else there is counts as one of several.
pub const MOST: usize = 64;

/// The parts of disks that do not decode: with the disk and the byte at which each begins, where it ends.
#[derive(Debug, Default)]
pub struct Salvaged {
    parts: BTreeMap<(u32, u64), u64>,
    /// Of each disk, where the first of those begins for which there was no room, and the bytes of all of them.
    rest: BTreeMap<u32, (u64, u64)>,
    /// The first damage of each image that was found when the image was verified.
    ignored: Vec<Ignored>,
}

impl Salvaged {
    /// Add `length` bytes from byte `from` of a disk on. What was read before, counts once.
    pub fn add(&mut self, disk: u32, from: u64, length: u64) {
        let end = from.saturating_add(length);
        let mut before = self.parts.range_mut((disk, 0)..=(disk, from));
        if let Some((_, last)) = before.next_back().filter(|(_, last)| **last >= from) {
            *last = end.max(*last);
        } else if self.parts.len() < MOST {
            self.parts.insert((disk, from), end);
        } else {
            let (first, bytes) = self.rest.get(&disk).copied().unwrap_or((from, 0));
            self.rest.insert(disk, (first.min(from), bytes.saturating_add(length)));
        }
    }

    /// Pass over what is wrong with an image as a whole: what its data needs is verified again when it is read.
    ///
    /// # Errors
    /// `error`, unless it is about damage.
    pub fn pass_over(&mut self, error: DriverError) -> DriverResult<()> {
        match error.code {
            // Drivers decode what is compressed when they have verified everything else: it will be found again.
            ErrorCode::ParseFailed => {}
            ErrorCode::OverlayCorrupt | ErrorCode::BackingCorrupt => self.ignored.push(Ignored {
                device: error.device.unwrap_or(u32::MAX),
                offset: error.offset.unwrap_or(u64::MAX),
                text: error.text,
            }),
            _ => return Err(error),
        }
        Ok(())
    }

    /// The damage that was passed over.
    pub fn ignored(&mut self) -> Vec<Ignored> {
        core::mem::take(&mut self.ignored)
    }

    /// The parts as the host is told of them, by disk and ascending, and then what had no room, by disk.
    pub fn parts(&self) -> impl Iterator<Item = Undecoded> + '_ {
        let parts = self.parts.iter().map(|(&(disk, guest_offset), end)| Undecoded {
            guest_offset,
            length: end - guest_offset,
            several: false,
            disk,
        });
        parts.chain(self.rest.iter().map(|(&disk, &(guest_offset, length))| Undecoded {
            guest_offset,
            length,
            several: true,
            disk,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    fn parts(salvaged: &Salvaged) -> Vec<(u32, u64, u64, bool)> {
        salvaged.parts().map(|part| (part.disk, part.guest_offset, part.length, part.several)).collect()
    }

    #[test]
    fn neighbors_are_one_part_and_there_are_not_too_many() {
        let mut salvaged = Salvaged::default();
        for from in [65536, 0, 4096, 65536] {
            salvaged.add(0, from, 4096);
        }
        assert_eq!(parts(&salvaged), vec![(0, 0, 8192, false), (0, 65536, 4096, false)]);
        for part in 0..MOST as u64 {
            salvaged.add(0, (part + 100) << 20, 512);
        }
        salvaged.add(1, 512, 512);
        let parts = parts(&salvaged);
        assert_eq!(parts[MOST..], [(0, 162 << 20, 1024, true), (1, 512, 512, true)]);
    }

    #[test]
    fn each_disk_has_its_own() {
        let mut salvaged = Salvaged::default();
        salvaged.add(1, 0, 512);
        salvaged.add(0, 4096, 512);
        salvaged.add(1, 512, 512);
        assert_eq!(parts(&salvaged), [(0, 4096, 512, false), (1, 0, 1024, false)]);
    }
}
