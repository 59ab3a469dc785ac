//! What images are made of, and which of them can be compared.

use crate::{le32, le64, View, GRAIN};
use instar_testkit::{ByteOrder, Layout};
use instar_vmdk_format::Header;

const SECTOR: usize = 512;

/// The fields of a valid image.
pub fn layout(bytes: &[u8]) -> Layout {
    let mut layout = Layout::new(ByteOrder::Little, SECTOR as u64, &[1 << 31, 1, 2, 1 << 16]);
    let header = if le64(bytes, 56) == u64::MAX { bytes.len() - 2 * SECTOR } else { 0 };
    // Numbers of four bytes, of eight, and the descriptor's text.
    for at in [0, header] {
        layout.fields(at, at + 80, 4);
        layout.fields(at + 12, at + 68, 8);
    }
    layout.fields(SECTOR, SECTOR + 160, 1);
    let (size, redundant) = (le64(bytes, 12) as usize * SECTOR, le32(bytes, 8) & 2 != 0);
    let tables = size.div_ceil(GRAIN).div_ceil(512);
    for directory in [le64(bytes, header + 56), le64(bytes, header + 48)].iter().take(1 + usize::from(redundant)) {
        let at = *directory as usize * SECTOR;
        layout.fields(at, at + tables * 4, 4);
        layout.places.push(*directory);
        for table in (0..tables).map(|index| le32(bytes, at + index * 4)).filter(|&table| table != 0) {
            layout.places.push(table as u64);
            let start = table * SECTOR;
            layout.fields(start, start + 256, 4);
            let entry = |index: usize| le32(bytes, start + index * 4);
            layout.places.extend((0..512).map(entry).filter(|&entry| entry > 1).take(8).map(|entry| entry as u64));
            for grain in (0..512).map(entry).filter(|&entry| entry > 1).take(2) {
                // The marker of a compressed grain, and its stream.
                layout.fields(grain * SECTOR, grain * SECTOR + 12, 4);
                layout.fields(grain * SECTOR + 12, grain * SECTOR + 44, 1);
            }
        }
    }
    let end = (bytes.len() / SECTOR) as u64;
    layout.places.extend([0, 1, end, end - 1, end + 2, (header / SECTOR) as u64]);
    layout
}

/// Whether the reader understands an image, and finds it consistent.
pub fn is_sound(bytes: &[u8]) -> bool {
    let footer = bytes.len() - 2 * SECTOR;
    let at_end = le64(bytes, 56) == u64::MAX;
    let comparable = le32(bytes, 20) == GRAIN / SECTOR
        && le32(bytes, 24) == 0
        && (!at_end || bytes[8..44] == bytes[footer + 8..footer + 44])
        && Header::parse(bytes.first_chunk().unwrap()).is_ok_and(|header| header.virtual_size() <= 4 << 20);
    if !comparable {
        return false;
    }
    let view = View::new(bytes);
    view.assert_consistent();
    // Everything that it holds can be read.
    view.content(&[]);
    true
}
