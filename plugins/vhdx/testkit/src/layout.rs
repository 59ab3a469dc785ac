//! What images are made of.

use crate::bytes::le64;
use crate::{View, MIB};
use instar_testkit::{ByteOrder, Layout};

/// The fields of a valid image.
pub fn layout(bytes: &[u8]) -> Layout {
    let mut layout = Layout::new(ByteOrder::Little, 1, &[6, 7, 1, 2, 3]);
    let view = View::new(bytes);
    for at in [64 << 10, 128 << 10] {
        layout.fields(at, at + 16, 4);
        layout.fields(at + 16, at + 64, 8);
        layout.fields(at + 64, at + 80, 4);
    }
    for at in [192 << 10, 256 << 10] {
        layout.fields(at, at + 80, 4);
    }
    layout.fields(view.metadata, view.metadata + 32 + 6 * 32, 4);
    layout.fields(view.metadata + 65536, view.metadata + 65536 + 64, 4);
    if let Some((at, length)) = view.locator {
        layout.fields(at, at + 20 + 36, 2);
        layout.fields(at + 56, at + length.min(400) / 4 * 4, 4);
    }
    let ratio = view.ratio();
    layout.fields(view.table.0, view.table.0 + view.table.1.len().min(8) * 8, 8);
    if view.table.1.len() > ratio {
        layout.fields(view.table.0 + ratio * 8, view.table.0 + ratio * 8 + 8, 8);
        let bitmap = (view.table.1[ratio] >> 20 << 20) as usize;
        if bitmap != 0 {
            layout.fields(bitmap, bitmap + 16, 1);
        }
    }
    // The log: its first entries, and the sectors of the first.
    let log = le64(&view.bytes, view.header + 72) as usize;
    for at in (log..log + 8 * 4096).step_by(4096) {
        if &bytes[at..at + 4] != [0; 4].as_slice() {
            layout.fields(at, at + 128, 4);
            layout.fields(at + 4088, at + 4096, 4);
        }
    }
    let end = bytes.len() as u64;
    layout.places.extend([
        0,
        MIB as u64,
        view.metadata as u64,
        view.table.0 as u64,
        end,
        end - MIB as u64,
        end + MIB as u64,
    ]);
    layout.places.extend(view.blocks().map(|(_, _, at)| at as u64));
    layout
}
