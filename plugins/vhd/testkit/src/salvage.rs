//! Reads damaged images as far as that is possible, straight from the specification. It shares no code with the driver.

use instar_testkit::{part, Disk};

/// A big-endian number of some bytes; `None` past the end of the file.
fn big(bytes: &[u8], at: u64, width: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let raw = bytes.get(at..at.checked_add(width)?)?;
    Some(raw.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

/// Size of the disk by the footer at `at`.
fn size(bytes: &[u8], at: u64) -> Option<u64> {
    let geometry = [(56, 2), (58, 1), (59, 1)].map(|(field, width)| big(bytes, at + field, width));
    let product = geometry.into_iter().try_fold(1, |product, number| Some(product * number?))?;
    let creator = part(bytes, at + 28, 4);
    let by_geometry = (creator == b"vpc " || creator == b"qemu") && product != 65535 * 16 * 255;
    Some(if by_geometry { product * 512 } else { big(bytes, at + 48, 8)? / 512 * 512 })
}

/// Where a footer is: in front, or at the end.
fn footer(bytes: &[u8]) -> Option<u64> {
    let end = (bytes.len() as u64).checked_sub(512)?;
    let valid = |at: u64| {
        let bytes = part(bytes, at, 512);
        let sum = bytes.iter().enumerate().filter(|(at, _)| !(64..68).contains(at));
        let sum: u32 = sum.map(|(_, &byte)| u32::from(byte)).sum();
        bytes.starts_with(b"conectix") && big(bytes, 64, 4) == Some(u64::from(!sum))
    };
    if valid(0) && big(bytes, 60, 4) != Some(2) {
        return Some(0);
    }
    Some(end).filter(|&end| valid(end))
}

/// What an image holds; `None` if its footer makes no sense, or the disk is too long to be compared.
pub fn salvage(bytes: &[u8]) -> Option<Disk> {
    let at = footer(bytes)?;
    let mut disk = Disk::new(size(bytes, at)?)?;
    if big(bytes, at + 60, 4)? == 2 {
        disk.hold(0, disk.length, part(bytes, 0, disk.length));
        return Some(disk);
    }
    let header = big(bytes, at + 16, 8)?;
    let table = big(bytes, header.checked_add(16)?, 8)?;
    let block =
        usize::try_from(big(bytes, header.checked_add(32)?, 4)?).ok().filter(|block| block.is_power_of_two())?;
    if block < 512 {
        return None;
    }
    for number in 0..disk.length.div_ceil(block) {
        let start = number * block;
        let entry = table.checked_add(number as u64 * 4).and_then(|at| big(bytes, at, 4));
        let place = match entry {
            Some(0xffff_ffff) => continue,
            Some(sector) => sector * 512,
            None => {
                disk.unreadable(start, block);
                continue;
            }
        };
        let bitmap = (block / 512).div_ceil(8).next_multiple_of(512) as u64;
        for within in 0..(disk.length - start).min(block) / 512 {
            match big(bytes, place + within as u64 / 8, 1) {
                Some(bits) if bits & (0x80 >> (within % 8)) == 0 => {}
                Some(_) => {
                    let data = part(bytes, place + bitmap + within as u64 * 512, 512);
                    disk.hold(start + within * 512, 512, data);
                }
                None => disk.unreadable(start + within * 512, 512),
            }
        }
    }
    Some(disk)
}
