//! Another size in a descriptor: the sectors of the last extent and the number of cylinders, and how the text is written so
//! that a crash leaves the old one or the new one. The ways are those of [another parent](crate::change_parent).

use crate::parent::{by_another_place, in_place, named_at, text_length, Embedded, Step};
use crate::{ExtentLine, FormatError, HeaderGrowth, HEADER_BYTES};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Sizes in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSize {
    /// Of the last extent.
    pub extent: u64,
    /// Of the disk, until now.
    pub old_disk: u64,
    /// Of the disk.
    pub disk: u64,
}

/// Bytes that are replaced, and by what.
type Edit = (Range<usize>, String);

/// The edits that have a text say another size: the sectors of its last extent, and the cylinders, if they follow from the size
/// as it is. VMware's limit for an old geometry, or what somebody has written there, stays.
fn edits(text: &[u8], size: &NewSize) -> Option<(Edit, Option<Edit>)> {
    let (mut extent, mut cylinders, mut heads, mut sectors) = (None, None, 0_u64, 0_u64);
    let mut start = 0;
    for line in text.split(|&byte| byte == b'\n') {
        if ExtentLine::parse(line.trim_ascii()).ok()?.is_some() {
            extent = Some(second_word(line, start)?);
        } else if let Some((key, range)) = number_of(line, start) {
            let value = || core::str::from_utf8(text.get(range.clone())?).ok()?.parse::<u64>().ok();
            match key {
                b"ddb.geometry.cylinders" => cylinders = value().map(|value| (range, value)),
                b"ddb.geometry.heads" => heads = value()?,
                b"ddb.geometry.sectors" => sectors = value()?,
                _ => {}
            }
        }
        start += line.len() + 1;
    }
    let cylinder = heads.checked_mul(sectors).filter(|&cylinder| cylinder > 0);
    let follows = |(_, value): &(Range<usize>, u64)| cylinder.is_some_and(|sectors| size.old_disk / sectors == *value);
    let cylinders = cylinders.filter(follows).zip(cylinder);
    let cylinders = cylinders.map(|((range, _), sectors)| (range, (size.disk / sectors).to_string()));
    Some(((extent?, size.extent.to_string()), cylinders))
}

/// Where the second word of a line stands in the text, in which the line begins at byte `start`.
fn second_word(line: &[u8], start: usize) -> Option<Range<usize>> {
    let blank = |byte: &u8| byte.is_ascii_whitespace();
    let first = line.iter().position(|byte| !blank(byte))?;
    let gap = first + line.get(first..)?.iter().position(blank)?;
    let second = gap + line.get(gap..)?.iter().position(|byte| !blank(byte))?;
    let end = line.get(second..)?.iter().position(blank).map_or(line.len(), |length| second + length);
    Some(start + second..start + end)
}

/// The key of a line, and where the digits of its value stand in the text.
fn number_of(line: &[u8], start: usize) -> Option<(&[u8], Range<usize>)> {
    let equals = line.iter().position(|&byte| byte == b'=')?;
    let key = line.get(..equals)?.trim_ascii();
    let first = equals + line.get(equals..)?.iter().position(u8::is_ascii_digit)?;
    let length = line.get(first..)?.iter().take_while(|byte| byte.is_ascii_digit()).count();
    Some((key, start + first..start + first + length))
}

/// A text with edits, which do not overlap.
fn edited(text: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut edits: Vec<&Edit> = edits.iter().collect();
    edits.sort_by_key(|(range, _)| range.start);
    let (mut new, mut at) = (Vec::new(), 0);
    for (range, value) in edits {
        new.extend_from_slice(text.get(at..range.start).unwrap_or_default());
        new.extend_from_slice(value.as_bytes());
        at = range.end;
    }
    new.extend_from_slice(text.get(at..).unwrap_or_default());
    new
}

/// The ends of comments, of `bytes` bytes, that no program needs: not of the first line, by which QEMU knows a
/// descriptor.
fn comment_ends(text: &[u8], bytes: usize) -> Vec<Edit> {
    let mut ends = Vec::new();
    let mut start = 0;
    for (index, line) in text.split(|&byte| byte == b'\n').enumerate() {
        let end = start + line.len() - usize::from(line.ends_with(b"\r"));
        if index > 0 && line.starts_with(b"#") && end - start > bytes {
            ends.push((end - bytes..end, String::new()));
        }
        start += line.len() + 1;
    }
    ends
}

/// The steps that have a descriptor which is the whole of a file, of these `bytes`, say another size. The file may become
/// `longest` bytes long.
///
/// # Errors
/// Where no order of writes survives a crash.
pub fn change_size(bytes: &[u8], size: &NewSize, longest: u64) -> Result<Vec<Step>, FormatError> {
    let text = bytes.get(..text_length(bytes)).unwrap_or_default();
    let (extent, cylinders) = edits(text, size).ok_or_else(|| FormatError::corrupt("the descriptor has no extents"))?;
    // The geometry is of less importance than the size; of no line may the rest move into another sector.
    let both: Vec<Edit> = [Some(extent.clone()), cylinders].into_iter().flatten().collect();
    for edits in [both, vec![extent.clone()]] {
        let plain = edited(text, &edits);
        let more = plain.len().saturating_sub(text.len());
        let ends = if more == 0 { Vec::new() } else { comment_ends(text, more) };
        let padded = ends.into_iter().map(|end| edited(text, &[edits.as_slice(), &[end]].concat()));
        let mut texts = core::iter::once(plain).chain(padded).filter(|text| text.len() as u64 <= longest);
        if let Some(steps) = texts.find_map(|text| in_place(bytes, &text, 0, true)) {
            return Ok(steps);
        }
    }
    Err(FormatError::unsupported(format!(
        "a crash could tear the descriptor, which is longer than a sector: while nothing uses the disk, put a comment line of {} \
         characters in front of the line of its last extent, with a text editor, and resize it again",
        extent.1.len() + 2
    )))
}

/// The steps that have a sparse extent with an embedded descriptor, of these `bytes`, say another size, in its header and in the
/// text: the header that is written last says both, that the disk has grown and where the new text is.
///
/// # Errors
/// Where the text has no room, or there is none for a copy of it behind the end of the file, which may become `longest` bytes
/// long.
pub fn grow_header(
    bytes: &[u8],
    size: &NewSize,
    (header, growth): (&[u8; HEADER_BYTES], &HeaderGrowth),
    embedded: Embedded,
    longest: u64,
) -> Result<Vec<Step>, FormatError> {
    let text = bytes.get(..text_length(bytes)).unwrap_or_default();
    let (extent, cylinders) = edits(text, size).ok_or_else(|| FormatError::corrupt("the descriptor has no extents"))?;
    let new = edited(text, &[Some(extent), cylinders].into_iter().flatten().collect::<Vec<_>>());
    let mut header = growth.apply(header);
    let is_home = embedded.offset == embedded.home.0;
    if is_home && new == text {
        return Ok(vec![Step { writes: vec![(0, header.to_vec())], length: None }]);
    }
    if new.len() as u64 >= embedded.home.1 {
        let text = format!("its descriptor has room for {} bytes only: convert it to a larger disk", embedded.home.1);
        return Err(FormatError::unsupported(text));
    }
    let mut steps = by_another_place(text, &new, &embedded, longest).map_err(|_| {
        let text = "there is no room for another descriptor behind the end of the file: convert it to a larger disk";
        FormatError::unsupported(text)
    })?;
    let home = named_at(embedded.home);
    let fields = usize::try_from(home.0).unwrap_or(0);
    header.get_mut(fields..fields + home.1.len()).into_iter().for_each(|place| place.copy_from_slice(&home.1));
    for step in steps.iter_mut().filter(|step| step.writes.first() == Some(&home)) {
        step.writes = vec![(0, header.to_vec())];
    }
    Ok(steps)
}
