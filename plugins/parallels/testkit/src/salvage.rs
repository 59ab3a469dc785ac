//! Reads damaged images as far as that is possible, straight from the specification. It shares no code with the driver.

use instar_testkit::{little, part, Disk, LONGEST};

/// What an image holds; `None` if its header makes no sense, or the disk is too long to be compared.
pub fn salvage(bytes: &[u8]) -> Option<Disk> {
    let newer = bytes.starts_with(b"WithouFreSpacExt");
    if !(newer || bytes.starts_with(b"WithoutFreeSpace")) || little(bytes, 16, 4)? != 2 {
        return None;
    }
    let (tracks, entries) = (little(bytes, 28, 4)?, little(bytes, 32, 4)?);
    let size = little(bytes, 36, if newer { 8 } else { 4 })?.checked_mul(512)?;
    if tracks == 0 || size > LONGEST {
        return None;
    }
    let (unit, cluster) = (if newer { tracks * 512 } else { 512 }, tracks * 512);
    let mut disk = Disk::new(size)?;
    // A longer cluster than the longest disk is cut by the disk.
    let length = usize::try_from(cluster).ok()?;
    for index in 0..disk.length.div_ceil(length) as u64 {
        let at = index as usize * length;
        let entry = if index < entries { little(bytes, 64 + index * 4, 4) } else { Some(0) };
        match entry {
            Some(0) => {}
            Some(entry) => {
                let rest = length.min(disk.length - at);
                disk.hold(at, length, part(bytes, entry * unit, rest));
            }
            None => disk.unreadable(at, length),
        }
    }
    Some(disk)
}
