//! Another backing file in a header: its name and format, exchanged in one sector.
//!
//! `backing_file_offset` and `backing_file_size` stand in the first sector of 512 bytes; the format is a header extension, and
//! the name lies behind the extensions, all within the first cluster ("Header" and "Header extensions" in the specification).
//! What a header of before reads behind its first sector stays as it is until the first sector has been exchanged: the new name
//! goes where nothing is, and an extension that is new or longer has to begin in the first sector.

use crate::extension::ExtensionKind;
use crate::header::{Header, Version, AUTOCLEAR_OFFSET, MAX_BACKING_NAME};
use crate::{autoclear, incompatible, Extension};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

/// What a disk writes whole or not at all, in bytes.
pub const SECTOR: usize = 512;
/// Longest name of a backing format that QEMU reads, in bytes (`qcow2_read_extensions`).
const MAX_BACKING_FORMAT: usize = 15;
/// Byte offset of `backing_file_offset` (8 bytes), which `backing_file_size` (4 bytes) follows.
const BACKING_FILE_FIELDS: Range<usize> = 8..20;

/// The first cluster, as far as it is of interest, at the end of each step. In each, what lies behind the first sector is to be
/// written first, and be durable before the first sector is.
pub type Steps = Vec<Vec<u8>>;

/// What a header has behind its fields.
struct Variable {
    /// The extensions, with their end marker.
    extensions: Range<usize>,
    /// The name of the backing file, empty if there is none.
    name: Range<usize>,
}

impl Variable {
    fn of(first: &[u8], header: &Header) -> Option<Self> {
        let fields = first.get(BACKING_FILE_FIELDS)?;
        let at = usize::try_from(u64::from_be_bytes(fields.get(..8)?.try_into().ok()?)).ok()?;
        let length = usize::try_from(u32::from_be_bytes(fields.get(8..)?.try_into().ok()?)).ok()?;
        let limit = if at == 0 { first.len() } else { at };
        let start = usize::try_from(header.header_length).ok()?;
        let end = match header.extensions.last() {
            None => start,
            Some(last) => usize::try_from(last.offset).ok()?.checked_add(record(last.kind, &last.data).len())?,
        };
        // Where the name follows at once, there is no end marker.
        let end = end.checked_add(8).filter(|&end| end <= limit).unwrap_or(end.min(limit));
        let name = if at == 0 { 0..0 } else { at..at.checked_add(length)? };
        Some(Self { extensions: start..end, name })
    }

    /// Whether a header that reads this finds it in `after` as in `before`, but for the first sector.
    fn is_kept(&self, before: &[u8], after: &[u8]) -> bool {
        [&self.extensions, &self.name].into_iter().all(|range| {
            let part = range.start.max(SECTOR)..range.end;
            part.is_empty() || before.get(part.clone()) == after.get(part)
        })
    }
}

/// An extension as it stands in the image.
fn record(kind: ExtensionKind, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from(kind.to_u32().to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// The extensions with this backing format, or none, in place of the one of before; all others as they are, in their order.
fn extensions(header: &Header, format: Option<&[u8]>) -> Vec<u8> {
    let mut new = format.map(|format| record(ExtensionKind::BackingFormat, format));
    let mut bytes = Vec::new();
    for Extension { kind, data, .. } in &header.extensions {
        if *kind == ExtensionKind::BackingFormat {
            bytes.extend(new.take().unwrap_or_default());
        } else {
            bytes.extend(record(*kind, data));
        }
    }
    bytes.extend(new.unwrap_or_default());
    // The end marker.
    bytes.extend([0; 8]);
    bytes
}

/// The header of `before` with these extensions and the `name` at byte `at`; `None` if there is no room, or if the header of
/// before would read something else before its first sector is exchanged.
fn moved(before: &[u8], kept: &Variable, extensions: &[u8], name: &[u8], at: usize) -> Option<Vec<u8>> {
    let start = kept.extensions.start;
    let end = start.checked_add(extensions.len())?;
    let mut after = before.to_vec();
    // What the header of before has in the first sector alone is not needed any more.
    for range in [&kept.extensions, &kept.name] {
        after.get_mut(range.start.min(SECTOR)..range.end.min(SECTOR))?.fill(0);
    }
    after.get_mut(start..end)?.copy_from_slice(extensions);
    let (at, length) = if name.is_empty() { (0, 0) } else { (at, name.len()) };
    if length > 0 {
        after.get_mut(at.max(end)..at.checked_add(length)?).filter(|_| at >= end)?.copy_from_slice(name);
    }
    let fields = after.get_mut(BACKING_FILE_FIELDS)?;
    fields.get_mut(..8)?.copy_from_slice(&(at as u64).to_be_bytes());
    fields.get_mut(8..)?.copy_from_slice(&u32::try_from(length).ok()?.to_be_bytes());
    kept.is_kept(before, &after).then_some(after)
}

/// The last step: what nobody reads any more is zero.
fn tidied(after: &[u8], old: &Variable, new: &Variable) -> Vec<u8> {
    let mut tidy = after.to_vec();
    for at in old.name.clone().chain(old.extensions.clone()) {
        if let Some(byte) = tidy.get_mut(at).filter(|_| !new.name.contains(&at) && !new.extensions.contains(&at)) {
            *byte = 0;
        }
    }
    tidy
}

/// How the header in `first`, the first cluster of a file, gets another backing file: name and format, or none. Autoclear
/// features that are not kept up are clear in every step.
///
/// # Errors
/// Why the header cannot name it, in one clause that says what to do.
pub fn parent_steps(first: &[u8], header: &Header, parent: Option<(&[u8], &[u8])>) -> Result<Steps, String> {
    let (name, format) = parent.unwrap_or_default();
    if name.len() > usize::try_from(MAX_BACKING_NAME).unwrap_or(0) {
        let length = name.len();
        return Err(format!(
            "a backing file's name of {length} bytes is longer than the {MAX_BACKING_NAME} that qcow2 has room for: move the \
             images to a shorter path"
        ));
    }
    if parent.is_some()
        && (name.is_empty() || name.contains(&0) || format.is_empty() || format.len() > MAX_BACKING_FORMAT)
    {
        return Err("a backing file whose name or format is empty, has a zero byte or is too long".into());
    }
    let damaged = || String::from("the header's extensions are not where they were");
    let new = extensions(header, parent.map(|_| format));
    let old = Variable::of(first, header).ok_or_else(damaged)?;
    // Behind all of it there is room for either name twice.
    let start = old.extensions.start;
    let used = old.extensions.end.max(old.name.end).max(start.saturating_add(new.len()));
    let most = usize::try_from(MAX_BACKING_NAME).unwrap_or(0).saturating_add(8).saturating_mul(2);
    let prefix = used.saturating_add(most).next_multiple_of(SECTOR).min(first.len());
    let mut before = first.get(..prefix).ok_or_else(damaged)?.to_vec();
    if header.version == Version::V3 {
        let at = usize::try_from(AUTOCLEAR_OFFSET).unwrap_or(0);
        let raw = if header.has(incompatible::DATA_FILE) { autoclear::DATA_FILE_RAW } else { 0 };
        let kept = header.autoclear & (autoclear::BITMAPS | raw);
        before.get_mut(at..at + 8).ok_or_else(damaged)?.copy_from_slice(&kept.to_be_bytes());
    }

    let behind = start.saturating_add(new.len());
    let places = |from: &Variable| [behind, from.name.start, from.name.end.max(behind).next_multiple_of(8)];
    let direct =
        |before: &[u8], from: &Variable| places(from).into_iter().find_map(|at| moved(before, from, &new, name, at));
    let aside = || {
        // The old name lies where the new extensions or the new name go, and is moved out of the way first.
        let own = extensions(header, header.backing_format());
        let old_name = first.get(old.name.clone())?;
        let at = behind.saturating_add(name.len()).max(old.name.end).next_multiple_of(8);
        let aside = moved(&before, &old, &own, old_name, at)?;
        let from = Variable::of(&aside, header)?;
        Some((direct(&aside, &from)?, aside))
    };
    let mut steps = Steps::new();
    let last = match direct(&before, &old) {
        Some(last) => last,
        None => {
            let (last, aside) = aside().ok_or_else(|| no_way(header, behind, name.len()))?;
            steps.push(aside);
            last
        }
    };
    let changed = verified(&last, first, header, parent).ok_or_else(damaged)?;
    let now = Variable::of(&last, &changed).ok_or_else(damaged)?;
    let mut tidy = tidied(&last, &old, &now);
    if let Some(moved) = steps.first() {
        let aside = Variable::of(moved, header).ok_or_else(damaged)?;
        tidy = tidied(&tidy, &aside, &now);
    }
    steps.push(last);
    steps.push(tidy);
    Ok(steps)
}

/// Why there is no way.
fn no_way(header: &Header, behind: usize, length: usize) -> String {
    let cluster = header.cluster_size.bytes();
    if behind.saturating_add(length) as u64 > cluster {
        return format!(
            "the header's cluster of {cluster} bytes has no room for a backing file's name of {length} bytes: move the images \
             to a shorter path"
        );
    }
    "the header's extensions cannot be changed in one write: `qemu-img rebase`, without -u, names another backing file, and must \
     not be interrupted"
        .into()
}

/// The header of the last step, if it says what it should, and all else as before.
fn verified(last: &[u8], first: &[u8], header: &Header, parent: Option<(&[u8], &[u8])>) -> Option<Header> {
    // It is parsed with all of its cluster.
    let mut whole = first.to_vec();
    whole.get_mut(..last.len())?.copy_from_slice(last);
    let changed = Header::parse(&whole).ok()?;
    let named = changed.backing_name.as_deref().zip(changed.backing_format());
    let others = |header: &Header| -> Vec<(ExtensionKind, Vec<u8>)> {
        let others = header.extensions.iter().filter(|extension| extension.kind != ExtensionKind::BackingFormat);
        others.map(|extension| (extension.kind, extension.data.clone())).collect()
    };
    let same = Header {
        backing_name: header.backing_name.clone(),
        autoclear: header.autoclear,
        extensions: header.extensions.clone(),
        ..changed.clone()
    };
    let is_right = named == parent
        && (parent.is_some() || (changed.backing_name.is_none() && changed.backing_format().is_none()))
        && others(&changed) == others(header)
        && same == *header;
    is_right.then_some(changed)
}
