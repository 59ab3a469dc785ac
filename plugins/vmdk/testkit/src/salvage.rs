//! Reads damaged images as far as that is possible, straight from the specification. It shares no code with the driver.

use instar_testkit::{little, part, Disk, LONGEST};

/// The first `size` bytes of what a stream decodes to.
fn inflate(stream: &[u8], size: usize) -> Option<Vec<u8>> {
    use miniz_oxide::inflate::core::{decompress, inflate_flags, DecompressorOxide};
    let mut bytes = vec![0; size];
    let flags = inflate_flags::TINFL_FLAG_PARSE_ZLIB_HEADER | inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (_, _, written) = decompress(&mut DecompressorOxide::new(), stream, &mut bytes, 0, flags);
    (written == size).then_some(bytes)
}

/// What an image holds; `None` if its header makes no sense, or the disk is too long to be compared.
pub fn salvage(bytes: &[u8]) -> Option<Disk> {
    let mut base = 0;
    if little(bytes, 56, 8)? == u64::MAX {
        base = (bytes.len() as u64).checked_sub(1024)?;
    }
    let flags = little(bytes, base + 8, 4)?;
    let grain = little(bytes, base + 20, 8)?.checked_mul(512).filter(|&grain| grain > 0 && grain <= LONGEST)? as usize;
    let length = little(bytes, base + 12, 8)?.checked_mul(512)?;
    let directory = little(bytes, base + 56, 8)?.checked_mul(512)?;
    if !bytes.starts_with(b"KDMV") || little(bytes, base + 44, 4)? != 512 {
        return None;
    }
    let mut disk = Disk::new(length)?;
    for number in 0..disk.length.div_ceil(grain) as u64 {
        let at = number as usize * grain;
        let table = directory.checked_add(number / 512 * 4).and_then(|at| little(bytes, at, 4));
        let entry = match table {
            Some(0) => Some(0),
            Some(table) => little(bytes, table * 512 + number % 512 * 4, 4),
            None => None,
        };
        match entry {
            Some(0) => {}
            Some(1) if flags & 4 != 0 => disk.hold(at, grain, &[]),
            Some(sector) if flags & (1 << 16) != 0 => {
                let stream =
                    little(bytes, sector * 512 + 8, 4).map(|length| part(bytes, sector * 512 + 12, length as usize));
                let rest = grain.min(disk.length - at);
                match stream.and_then(|stream| inflate(stream, rest).or_else(|| inflate(stream, grain))) {
                    Some(bytes) => disk.hold(at, grain, &bytes),
                    None => disk.unreadable(at, grain),
                }
            }
            // QEMU reads zeroes past the end of the file, which the image does not say.
            Some(sector) if sector * 512 >= bytes.len() as u64 => disk.unreadable(at, grain),
            Some(sector) => disk.hold(at, grain, part(bytes, sector * 512, grain)),
            None => disk.unreadable(at, grain),
        }
    }
    Some(disk)
}
