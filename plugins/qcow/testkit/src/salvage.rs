//! Reads damaged images as far as that is possible, straight from what `block/qcow.c` reads. It shares no code with the
//! driver.

use instar_testkit::{part, Disk, LONGEST};
use miniz_oxide::inflate::decompress_to_vec_with_limit;

/// A big-endian number of some bytes; `None` past the end of the file.
fn big(bytes: &[u8], at: u64, width: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let raw = bytes.get(at..at.checked_add(width)?)?;
    Some(raw.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

/// What an image holds; `None` if its header makes no sense, or the disk is too long to be compared.
pub fn salvage(bytes: &[u8]) -> Option<Disk> {
    if bytes.get(..8)? != b"QFI\xfb\0\0\0\x01" {
        return None;
    }
    let (size, cluster_bits, l2_bits) = (big(bytes, 24, 8)?, big(bytes, 32, 1)?, big(bytes, 33, 1)?);
    if !(9..=16).contains(&cluster_bits) || !(6..=13).contains(&l2_bits) || size > LONGEST {
        return None;
    }
    let l1 = big(bytes, 40, 8)?;
    let mut disk = Disk::new(size - size % 512)?;
    let cluster = 1usize << cluster_bits;
    for index in 0..disk.length.div_ceil(cluster) as u64 {
        let at = index as usize * cluster;
        let entry =
            l1.checked_add((index >> l2_bits) * 8).and_then(|at| big(bytes, at, 8)).and_then(|table| match table {
                0 => Some(0),
                table => big(bytes, table.checked_add((index & ((1 << l2_bits) - 1)) * 8)?, 8),
            });
        match entry {
            Some(0) => {}
            Some(entry) if entry >> 63 == 1 => {
                let shift = 63 - cluster_bits;
                let length = (entry >> shift) as usize & (cluster - 1);
                let stream = part(bytes, entry & ((1 << shift) - 1), length);
                match decompress_to_vec_with_limit(stream, cluster) {
                    Ok(content) if content.len() == cluster => disk.hold(at, cluster, &content),
                    _ => disk.unreadable(at, cluster),
                }
            }
            Some(entry) => disk.hold(at, cluster, part(bytes, entry, cluster)),
            None => disk.unreadable(at, cluster),
        }
    }
    Some(disk)
}
