//! The first cluster: extensions, and the name of the backing file.

use crate::{be32, be64};

/// The header extension that names the backing file's format.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The feature name table.
pub const FEATURE_NAMES: u32 = 0x6803_f857;

/// Where the extensions begin.
fn start(bytes: &[u8]) -> usize {
    if be32(bytes, 4) == 2 {
        72
    } else {
        be32(bytes, 100) as usize
    }
}

/// The extensions, each with its type, and where its data begins. They end with a type of 0, or where the name of the backing file begins.
pub fn extensions(bytes: &[u8]) -> Vec<(u32, usize, Vec<u8>)> {
    let limit = match be64(bytes, 8) as usize {
        0 => 1 << be32(bytes, 20),
        name => name,
    };
    let (mut at, mut found) = (start(bytes), Vec::new());
    while at + 8 <= limit && be32(bytes, at) != 0 {
        let length = be32(bytes, at + 4) as usize;
        found.push((be32(bytes, at), at + 8, bytes[at + 8..at + 8 + length].to_vec()));
        at += 8 + length.next_multiple_of(8);
    }
    found
}

/// The name of the backing file.
pub fn backing_name(bytes: &[u8]) -> Option<Vec<u8>> {
    let (at, length) = (be64(bytes, 8) as usize, be32(bytes, 16) as usize);
    (at != 0 && length != 0).then(|| bytes[at..at + length].to_vec())
}

/// The image with these extensions, an end marker if there is `room` for it, and this name `room` bytes behind them.
pub fn with_header(mut bytes: Vec<u8>, all: &[(u32, Vec<u8>)], room: usize, name: &[u8]) -> Vec<u8> {
    let (mut at, end) = (start(&bytes), 1 << be32(&bytes, 20));
    bytes[at..end].fill(0);
    for (kind, data) in all {
        bytes[at..at + 4].copy_from_slice(&kind.to_be_bytes());
        bytes[at + 4..at + 8].copy_from_slice(&(data.len() as u32).to_be_bytes());
        bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
        at += 8 + data.len().next_multiple_of(8);
    }
    at += room;
    bytes[at..at + name.len()].copy_from_slice(name);
    let at = if name.is_empty() { 0 } else { at as u64 };
    bytes[8..16].copy_from_slice(&at.to_be_bytes());
    bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    bytes
}
