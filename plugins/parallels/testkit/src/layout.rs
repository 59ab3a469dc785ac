//! What images are made of, and which of them can be compared.

use crate::{le32, View};
use instar_testkit::{ByteOrder, Layout};

/// The fields of a valid image.
pub fn layout(bytes: &[u8]) -> Layout {
    let mut layout = Layout::new(ByteOrder::Little, 1, &[1 << 31, 1, 0x746f_6e59, 0x312e_3276]);
    layout.fields(16, 64, 4);
    let view = View::new(bytes);
    layout.fields(64, view.bat_end, 4);
    // Fields count bytes in nothing: sectors, or clusters.
    let (sectors, clusters) = (bytes.len() / 512, bytes.len() / view.cluster);
    let of = |number: usize| number as u64;
    layout.places.extend([0, 1, of(sectors), of(clusters), of(sectors) - 1, of(view.data / 512)]);
    layout.places.extend((64..view.bat_end).step_by(4).map(|at| u64::from(le32(bytes, at))));
    layout
}

/// Whether the reader understands an image, and finds it consistent.
pub fn is_sound(bytes: &[u8]) -> bool {
    let comparable = bytes.len() >= 64
        && instar_parallels_format::Header::parse(bytes.first_chunk().unwrap()).is_ok_and(|header| {
            header.data_is_aligned() && header.virtual_size() <= 4 << 20 && header.bat_end() <= bytes.len() as u64
        });
    if !comparable {
        return false;
    }
    View::new(bytes).assert_consistent();
    true
}
