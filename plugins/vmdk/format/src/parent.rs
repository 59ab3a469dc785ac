//! Another parent in a descriptor: `parentCID` and `parentFileNameHint`, and how the text is written so that a crash leaves the
//! one or the other, whole.
//!
//! What is on the disk after a power loss is any subset of the sectors that were written since the last flush. So the text is
//! changed by a single write of one sector, and before and after it only what no reader looks at:
//!
//! - **in its place**, if both texts are the same but for one sector, and behind the end of either. A text ends at its first zero
//!   byte, so what follows that can be written before it counts, and be cleared when it no longer does;
//! - **in its place, as long as before**, with spaces behind a shorter name, so that nothing moves that stands in other sectors;
//! - **by way of another place**, of a descriptor that the header of a sparse extent names: a copy of the old text goes behind
//!   the end of the file, the header names that, the new text takes the old one's place, and the header names it. So what a
//!   crash leaves names the old parent until all is done, and is done again. Programs that do not ask the header find the text
//!   in its place: QEMU reads sector 1 (`vmdk_open`).

use crate::create::quotable;
use crate::{Descriptor, FormatError, SECTOR};
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Byte of the header of a sparse extent at which `descriptorOffset` and `descriptorSize` stand.
const DESCRIPTOR_FIELDS: u64 = 28;

/// A part of a change. All of it has to be durable before the next one begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Bytes, and where in the file they go.
    pub writes: Vec<(u64, Vec<u8>)>,
    /// The length that the file gets before that, in bytes.
    pub length: Option<u64>,
}

/// A descriptor that is a part of a sparse extent.
#[derive(Clone, Copy, Debug)]
pub struct Embedded {
    /// First byte in the file.
    pub offset: u64,
    /// Where it belongs: behind the header, in front of everything else; byte offset and bytes.
    pub home: (u64, u64),
    /// Bytes of the file, behind whose end it may stand for a while; `None` if something has to stay at the end.
    pub file_length: Option<u64>,
}

/// A text whose parent is about to change.
struct Edit<'a> {
    text: &'a [u8],
    /// The digits of `parentCID`.
    digits: Range<usize>,
    /// The value of `parentFileNameHint`, with its quotes and what follows them on the line.
    hint: Range<usize>,
}

impl Edit<'_> {
    /// The text with other values.
    fn with(&self, id: u32, hint: &str) -> Vec<u8> {
        let mut changes = [(self.digits.clone(), format!("{id:08x}")), (self.hint.clone(), String::from(hint))];
        changes.sort_by_key(|(range, _)| range.start);
        let (mut new, mut at) = (Vec::new(), 0);
        for (range, value) in changes {
            new.extend_from_slice(&self.text[at..range.start]);
            new.extend_from_slice(value.as_bytes());
            at = range.end;
        }
        new.extend_from_slice(&self.text[at..]);
        new
    }

    /// Why a descriptor that is a file cannot get a name that is longer than the one it has.
    fn too_long(&self, id: u32) -> FormatError {
        let sector = |at: usize| at as u64 / SECTOR;
        let is_one = sector(self.digits.start.min(self.hint.start)) == sector(self.digits.end.max(self.hint.end) - 1);
        let most = (self.digits.len() + self.hint.len()).saturating_sub(format!("{id:08x}\"\"").len());
        let shorter =
            if is_one { format!(" give the parent a name of at most {most} bytes, or") } else { String::new() };
        FormatError::unsupported(format!(
            "a crash could tear the descriptor, which is longer than a sector:{shorter} set parentCID={id:08x} and \
             parentFileNameHint in it with a text editor"
        ))
    }
}

/// Where the value of `parentFileNameHint` stands, up to the end of its line.
fn hint_of(text: &[u8]) -> Option<Range<usize>> {
    let mut start = 0;
    for line in text.split(|&byte| byte == b'\n') {
        let equals = line.iter().position(|&byte| byte == b'=');
        if let Some(equals) = equals.filter(|&at| line[..at].trim_ascii() == b"parentFileNameHint") {
            let value = &line[equals + 1..];
            let blanks = value.len() - value.trim_ascii_start().len();
            let end = line.len() - usize::from(line.ends_with(b"\r"));
            return Some(start + (equals + 1 + blanks).min(end)..start + end);
        }
        start += line.len() + 1;
    }
    None
}

/// The steps that give a descriptor another parent, `name` with the content ID `id`. `bytes` are those of the place that the
/// descriptor has; without `embedded` it is the whole of a file, which may become `longest` bytes long.
///
/// # Errors
/// For a descriptor without a parent, a name that cannot stand in it, and where no order of writes survives a crash.
pub fn change_parent(
    bytes: &[u8],
    (name, id): (&str, u32),
    embedded: Option<Embedded>,
    longest: u64,
) -> Result<Vec<Step>, FormatError> {
    let descriptor = Descriptor::parse(bytes)?;
    let text = &bytes[..text_length(bytes)];
    let digits = descriptor.parent_id.as_ref().filter(|_| descriptor.parent().is_some()).map(|id| id.digits.clone());
    let (Some(digits), Some(hint)) = (digits, hint_of(text)) else {
        return Err(FormatError::unsupported("it has no parent that could be another one"));
    };
    let foreign = descriptor.encoding.as_ref().filter(|encoding| !encoding.eq_ignore_ascii_case(b"UTF-8"));
    if !quotable(name.as_bytes()) || !name.is_ascii() && foreign.is_some() {
        let text = format!("give the parent another name: '{}' cannot stand in this descriptor", name.escape_default());
        return Err(FormatError::unsupported(text));
    }
    let edit = Edit { text, digits, hint };
    let quoted = format!("\"{name}\"");
    let new = edit.with(id, &quoted);
    let changed = Descriptor::parse(&new)?;
    if (changed.parent(), changed.parent_hint.as_deref()) != (Some(id), Some(name.as_bytes())) {
        let text = format!("the content ID {id:08x} of the parent says that there is none: write to the parent once");
        return Err(FormatError::unsupported(text));
    }
    if let Some(embedded) = embedded {
        let steps = Some(embedded).filter(|embedded| embedded.offset == embedded.home.0);
        let steps = steps.and_then(|embedded| in_place(bytes, &new, embedded.offset, false));
        return steps.map_or_else(|| by_another_place(text, &new, &embedded, longest), Ok);
    }
    let padded = edit.with(id, &(quoted + &" ".repeat(text.len().saturating_sub(new.len()))));
    let mut fitting = [&new, &padded].into_iter().filter(|text| text.len() as u64 <= longest);
    let steps = fitting.find_map(|text| in_place(bytes, text, 0, true));
    steps.ok_or_else(|| edit.too_long(id))
}

/// Bytes of the text: up to the first zero byte.
pub(crate) fn text_length(bytes: &[u8]) -> usize {
    bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len())
}

/// The steps that replace the text in its place, which begins at byte `offset` of the file, if a single sector decides which of
/// the two is there. A descriptor that is a file is cut behind its text if it was; another one keeps its place, and a zero
/// byte behind the text.
pub(crate) fn in_place(bytes: &[u8], new: &[u8], offset: u64, is_file: bool) -> Option<Vec<Step>> {
    let sector = usize::try_from(SECTOR).ok()?;
    let (old_length, size) = (text_length(bytes), bytes.len().max(new.len()));
    if !is_file && new.len() >= bytes.len() {
        return None;
    }
    let mut old = bytes.to_vec();
    old.resize(size, 0);
    let mut target = old.clone();
    target[..new.len()].copy_from_slice(new);
    let clear = new.len()..old_length.max(new.len() + 1).min(size);
    target.get_mut(clear)?.fill(0);
    let differing = old.chunks(sector).zip(target.chunks(sector)).enumerate().filter(|(_, (old, new))| old != new);
    let write = |(index, (_, new)): (usize, (&[u8], &[u8]))| (index, (offset + (index * sector) as u64, new.to_vec()));
    // The sectors with the zero byte that ends either text: what lies behind the first of them is not read before, or not
    // afterwards.
    let (old_end, new_end) = (old_length / sector, new.len() / sector);
    let (read, behind): (Vec<_>, Vec<_>) = differing.map(write).partition(|(index, _)| *index <= old_end.min(new_end));
    if read.is_empty() {
        return Some(Vec::new());
    }
    let [(_, switch)] = <[_; 1]>::try_from(read).ok()?;
    let behind: Vec<_> = behind.into_iter().map(|(_, write)| write).collect();
    let (before, after) = if new_end > old_end { (behind, Vec::new()) } else { (Vec::new(), behind) };
    let grows = (size > bytes.len()).then_some(size as u64);
    let shrinks = is_file && old_length == bytes.len() && new.len() < size;
    let after = if shrinks {
        Step { length: Some(new.len() as u64), writes: Vec::new() }
    } else {
        Step { length: None, writes: after }
    };
    let steps = [Step { writes: before, length: grows }, Step { writes: vec![switch], length: None }, after];
    Some(steps.into_iter().filter(|step| *step != Step::default()).collect())
}

/// The fields of a header that name a descriptor at this offset and of this length in bytes: where they stand, and
/// their bytes.
pub(crate) fn named_at((offset, length): (u64, u64)) -> (u64, Vec<u8>) {
    (DESCRIPTOR_FIELDS, [offset / SECTOR, length / SECTOR].map(u64::to_le_bytes).concat())
}

/// The steps that put a text into its home, while a copy of the old one, which may be there already, stands behind the end of
/// the file.
pub(crate) fn by_another_place(
    old: &[u8],
    new: &[u8],
    embedded: &Embedded,
    longest: u64,
) -> Result<Vec<Step>, FormatError> {
    let Embedded { offset, home, file_length } = *embedded;
    if new.len() as u64 >= home.1 {
        let text = format!("the descriptor has room for {} bytes only: give the parent a shorter name", home.1);
        return Err(FormatError::unsupported(text));
    }
    let write = |offset, bytes| Step { writes: vec![(offset, bytes)], length: None };
    let named = |place| {
        let (offset, bytes) = named_at(place);
        write(offset, bytes)
    };
    let mut text = new.to_vec();
    text.resize(usize::try_from(home.1).unwrap_or(new.len()), 0);
    let at_home = [write(home.0, text), named(home)];
    if offset != home.0 {
        return Ok(at_home.into());
    }
    let mut copy = old.to_vec();
    copy.resize(old.len().next_multiple_of(usize::try_from(SECTOR).unwrap_or(1)), 0);
    let length = copy.len() as u64;
    let place = file_length.and_then(|end| end.checked_next_multiple_of(SECTOR));
    let place = place.filter(|place| place.checked_add(length).is_some_and(|end| end <= longest));
    let (Some(place), Some(file_length)) = (place, file_length) else {
        let text =
            "a crash could tear its descriptor, and there is no room for another one behind the end of the file: \
                    commit it into its present parent first";
        return Err(FormatError::unsupported(text));
    };
    let mut steps = vec![write(place, copy), named((place, length))];
    steps.extend(at_home);
    steps.push(Step { writes: Vec::new(), length: Some(file_length) });
    Ok(steps)
}
