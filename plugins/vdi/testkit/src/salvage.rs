//! Reads damaged images as far as that is possible, straight from `VDICore.h`. It shares no code with the driver.

use instar_testkit::{little, part, Disk, LONGEST};

/// What an image holds; `None` if its header makes no sense, or the disk is too long to be compared.
pub fn salvage(bytes: &[u8]) -> Option<Disk> {
    if little(bytes, 64, 4)? != 0xbeda_107f || little(bytes, 68, 4)? >> 16 != 1 {
        return None;
    }
    let number = |at| little(bytes, at, 4);
    let (map, data, block, extra) = (number(340)?, number(344)?, number(376)?, number(380)?);
    // A longer block than the longest disk is cut by the disk.
    let length = usize::try_from(block).ok().filter(|&block| block > 0)?;
    // QEMU takes an odd size for the next multiple of 512.
    let mut disk = Disk::new(little(bytes, 368, 8)?.checked_next_multiple_of(512)?)?;
    for index in 0..disk.length.div_ceil(length).min(LONGEST as usize) {
        let at = index * length;
        match number(map + index as u64 * 4) {
            Some(0xffff_ffff) => {}
            Some(0xffff_fffe) => disk.hold(at, length, &[]),
            Some(slot) => {
                let place = data + slot * (block + extra) + extra;
                let rest = length.min(disk.length - at);
                disk.hold(at, length, part(bytes, place, rest));
            }
            None => disk.unreadable(at, length),
        }
    }
    Some(disk)
}
