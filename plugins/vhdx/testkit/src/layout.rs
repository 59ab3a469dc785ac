//! What images are made of.

use crate::bytes::{le32, le64, seal};
use crate::{View, MIB};
use instar_testkit::{ByteOrder, Layout};
use std::ops::Range;

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
    // The log: headers of entries with their descriptors, and sectors of data.
    let log = le64(&view.bytes, view.header + 72) as usize;
    for at in (log..log + 24 * 4096).step_by(4096).filter(|at| bytes[*at..*at + 4] != [0; 4]) {
        layout.fields(at, at + 320, 4);
        layout.fields(at + 4088, at + 4096, 4);
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

/// Make the checksums right of what has one: headers, region tables, and entries of the log, wherever one begins.
pub fn seal_all(bytes: &mut [u8]) {
    for (at, length, signature) in [
        (64 << 10, 4096, b"head"),
        (128 << 10, 4096, b"head"),
        (192 << 10, 65536, b"regi"),
        (256 << 10, 65536, b"regi"),
    ] {
        if bytes.get(at..at + length).is_some_and(|part| part.starts_with(signature)) {
            seal(bytes, at, length);
        }
    }
    for header in [64 << 10, 128 << 10] {
        let (log, length) = (le64(bytes, header + 72) as usize, le32(bytes, header + 68));
        let Some(log) = bytes.get_mut(log..log.saturating_add(length)) else { continue };
        for at in (0..log.len()).step_by(4096) {
            let end = at.saturating_add(le32(log, at + 8));
            // One that goes on at the beginning of the log is none of those that are made here.
            if log[at..].starts_with(b"loge") && end >= at + 4096 && end <= log.len() {
                seal(log, at, end - at);
            }
        }
    }
}

/// Whether two images differ by what they record of the parent, and nothing else: the two values of the locator that are GUIDs,
/// or, where those cannot be changed in their places, the header that is written (its sequence number, its FileWriteGuid, its checksum).
pub fn differ_by_parent(was: &[u8], is: &[u8]) -> bool {
    let view = View::new(was);
    let linkages = ["parent_linkage", "parent_linkage2"].into_iter().filter_map(|key| view.place(key));
    let mut allowed: Vec<Range<usize>> = linkages.collect();
    let torn = |range: &Range<usize>| range.start / 512 != (range.end - 1) / 512;
    let by_header = allowed.len() < 2 || allowed.iter().any(torn) || view.is_dirty();
    allowed.extend([64 << 10, 128 << 10].into_iter().filter(|_| by_header).map(|at| at..at + 4096));
    let differ = |at: &usize| was[*at] != is[*at];
    was.len() == is.len() && (0..was.len()).filter(differ).all(|at| allowed.iter().any(|range| range.contains(&at)))
}
