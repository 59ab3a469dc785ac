//! What images are made of, and which of them can be compared.

use crate::bytes::{be32, be64, seal};
use crate::view::has_footer;
use crate::{Kind, View, SECTOR};
use instar_testkit::{ByteOrder, Layout};

/// The fields of a valid image.
pub fn layout(bytes: &[u8]) -> Layout {
    let mut layout = Layout::new(ByteOrder::Big, SECTOR as u64, &[1 << 31, 1]);
    let view = View::new(bytes);
    let end = bytes.len() - SECTOR;
    for at in [0, end] {
        if has_footer(bytes, at) {
            layout.fields(at, at + 88, 4);
            layout.fields(at + 16, at + 56, 8);
        }
    }
    if view.kind != Kind::Fixed {
        layout.fields(512, 512 + 64, 4);
        layout.fields(512 + 576, 512 + 576 + 48, 4);
        layout.fields(view.table.0, view.table.0 + view.table.1.len() * 4, 4);
        layout.places.extend([1, (view.table.0 / SECTOR) as u64]);
        if let Some((at, map, _)) = view.batmap() {
            layout.fields(at, at + 28, 4);
            layout.fields(at + SECTOR, at + SECTOR + map.len().min(16), 1);
            layout.places.push((at / SECTOR) as u64);
        }
        for (_, at) in view.blocks().take(8) {
            layout.fields(at, at + 16, 1);
            layout.places.push((at / SECTOR) as u64);
        }
    }
    let end = (bytes.len() / SECTOR) as u64;
    layout.places.extend([0, end, end - 1, end + 2]);
    layout
}

/// Make the checksums right of both footers, and of the header behind the one in front.
pub fn seal_all(bytes: &mut [u8]) {
    let end = bytes.len().saturating_sub(SECTOR);
    let places = [(0, SECTOR, 64, &b"conectix"[..]), (end, SECTOR, 64, b"conectix"), (SECTOR, 1024, 36, b"cxsparse")];
    for (at, length, field, signature) in places {
        if bytes.get(at..at + length).is_some_and(|part| part.starts_with(signature)) {
            seal(bytes, at, length, field);
        }
    }
}

/// Whether the reader understands an image.
pub fn is_comparable(bytes: &[u8]) -> bool {
    let end = bytes.len() - SECTOR;
    if has_footer(bytes, end) && be32(bytes, end + 60) == 2 {
        let known = bytes[end + 28..end + 32] != *b"vpc " && bytes[end + 28..end + 32] != *b"qemu";
        return known && be64(bytes, end + 48) <= end as u64 && !has_footer(bytes, 0);
    }
    let front = has_footer(bytes, 0) && be32(bytes, 60) != 2;
    let header = be64(bytes, 16);
    let inside = header.is_multiple_of(SECTOR as u64) && header.saturating_add(1024) <= bytes.len() as u64;
    front && inside && be64(bytes, 48) <= 4 << 20 && bytes[28..32] != *b"vpc " && bytes[28..32] != *b"qemu"
}
