//! What images are made of, and which of them can be compared.

use crate::{le32, le64, View, BLOCK};
use instar_testkit::{ByteOrder, Layout};

/// The fields of a valid image.
pub fn layout(bytes: &[u8]) -> Layout {
    let mut layout = Layout::new(ByteOrder::Little, 1, &[1 << 31, 1, 1 << 16]);
    // Numbers of four bytes, the identifiers, and the geometry.
    layout.fields(64, 84, 4);
    layout.fields(340, 392, 4);
    layout.fields(392, 456, 8);
    layout.fields(456, 472, 4);
    let (map, data, count) = (le32(bytes, 340), le32(bytes, 344), le32(bytes, 384));
    layout.fields(map, map + count * 4, 4);
    // Entries name slots, and fields of the header bytes: numbers of either kind.
    let slots = ((bytes.len() - data) / BLOCK) as u64;
    layout.places.extend([0, 1, slots, slots.saturating_sub(1), slots + 2, 0xffff_fffe, 0xffff_ffff]);
    layout.places.extend([map as u64, data as u64, data as u64 + 512, bytes.len() as u64]);
    layout
}

/// Whether the reader understands an image, and finds it consistent.
pub fn is_sound(bytes: &[u8]) -> bool {
    let comparable = le32(bytes, 376) == BLOCK
        && le32(bytes, 384) <= 1 << 16
        && le32(bytes, 340) + le32(bytes, 384) * 4 <= bytes.len()
        && le64(bytes, 368) <= (4 << 20).min((le32(bytes, 384) * BLOCK) as u64)
        && instar_vdi_format::Header::parse(bytes.first_chunk().unwrap()).is_ok();
    if !comparable {
        return false;
    }
    View::new(bytes).assert_consistent();
    true
}
