//! What images are made of, and which of them can be compared.

use crate::{be64, View};
use instar_testkit::{ByteOrder, Field, Layout};

/// The fields of a valid image.
pub fn layout(bytes: &[u8]) -> Layout {
    let mut layout = Layout::new(ByteOrder::Big, 1, &[1 << 63, 1 << 53, 1 << 62, 1]);
    layout.kind([(8, 8), (16, 4), (24, 8), (32, 1), (33, 1), (36, 4), (40, 8)].map(|(at, width)| Field { at, width }));
    let view = View::new(bytes);
    layout.fields(view.l1.start, view.l1.end, 8);
    layout.kind(view.tables.iter().flat_map(|table| table.clone().step_by(8)).map(|at| Field { at, width: 8 }));
    layout.places.extend([0, 48, view.l1.start as u64, view.l1.end as u64, bytes.len() as u64]);
    layout.places.extend(view.tables.iter().map(|table| table.start as u64));
    layout.places.extend(view.entries.values());
    layout
}

/// Whether the reader understands an image, and finds it consistent.
pub fn is_sound(bytes: &[u8]) -> bool {
    let comparable = bytes.len() >= 48
        && instar_qcow_format::Header::parse(bytes.first_chunk().unwrap()).is_ok_and(|header| !header.encrypted)
        && be64(bytes, 24) <= 4 << 20
        && be64(bytes, 40) <= bytes.len() as u64;
    if !comparable {
        return false;
    }
    View::new(bytes).assert_consistent();
    true
}
