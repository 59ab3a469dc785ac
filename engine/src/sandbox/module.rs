//! Loads a guest module: checks the ELF, places and relocates it. Modules come from plugins, which are trusted code,
//! but may be damaged; whatever the bytes are, the answer is an image or a sentence.

use super::rights::Rights;
use instar_guest_abi::PAGE_SIZE;
use object::elf::{self, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::LittleEndian;
use std::borrow::Cow;
use std::ops::Range;

/// Largest module image in bytes.
const MAX_IMAGE: u64 = 16 << 20;
const RELA_SIZE: usize = 24;

type Header = FileHeader64<LittleEndian>;
type ProgramHeader64 = elf::ProgramHeader64<LittleEndian>;

/// A module, placed and relocated.
#[derive(Debug, PartialEq, Eq)]
pub struct Loaded<'data> {
    /// Address of its first byte.
    pub base: u64,
    /// Bytes from there to its end, a whole number of pages.
    pub length: u64,
    /// Address of the entry.
    pub entry: u64,
    /// What is in its pages, ascending.
    pub segments: Vec<Segment<'data>>,
}

/// Pages of a module.
#[derive(Debug, PartialEq, Eq)]
pub struct Segment<'data> {
    /// Their addresses.
    pub range: Range<u64>,
    /// How they are to be mapped.
    pub rights: Rights,
    /// What they begin with; zeroes follow. Those of the file, unless a relocation changes them.
    pub bytes: Cow<'data, [u8]>,
}

/// Load the ELF in `data` at `base`, a page address.
///
/// # Errors
/// One clause that says what is wrong with it.
pub fn load(data: &[u8], base: u64) -> Result<Loaded<'_>, String> {
    let header = Header::parse(data).map_err(|e| format!("it is not a 64-bit ELF file: {e}"))?;
    let endian = header.endian().map_err(|_| "it is not a little-endian ELF file".to_owned())?;
    if header.e_machine(endian) != elf::EM_X86_64 || header.e_type(endian) != elf::ET_DYN {
        return Err("it is not a position-independent x86-64 ELF file".to_owned());
    }
    let headers = header.program_headers(endian, data).map_err(|e| format!("its program headers: {e}"))?;
    let mut segments: Vec<Segment<'_>> = Vec::new();
    for header in headers {
        match header.p_type(endian) {
            elf::PT_LOAD => {
                let after = segments.last().map_or(0, |segment| segment.range.end);
                segments.push(segment(header, endian, data, after)?);
            }
            elf::PT_INTERP => return Err("it asks for a dynamic linker".to_owned()),
            elf::PT_TLS => return Err("it has thread-local storage".to_owned()),
            _ => {}
        }
    }
    let length = segments.last().ok_or("it has nothing to load")?.range.end;
    for header in headers {
        if let Some(dynamic) = header.dynamic(endian, data).map_err(|e| format!("its dynamic section: {e}"))? {
            relocate(&mut segments, (base, length), &relocations(dynamic, endian)?)?;
        }
    }
    let entry = header.e_entry(endian);
    if !segments.iter().any(|segment| segment.rights.execute && segment.range.contains(&entry)) {
        return Err("its entry is not in executable code".to_owned());
    }
    for segment in &mut segments {
        segment.range = segment.range.start + base..segment.range.end + base;
    }
    Ok(Loaded { base, length, entry: entry + base, segments })
}

/// A segment, at its address without a base. `after` is the end of the segment before.
fn segment<'data>(
    header: &ProgramHeader64,
    endian: LittleEndian,
    data: &'data [u8],
    after: u64,
) -> Result<Segment<'data>, String> {
    let (start, size) = (header.p_vaddr(endian), header.p_memsz(endian));
    let flags = header.p_flags(endian);
    let has = |flag: elf::ProgramFlags| flags.0 & flag.0 != 0;
    let rights = Rights { user: true, write: has(elf::PF_W), execute: has(elf::PF_X) };
    if rights.write && rights.execute {
        return Err("a segment is both writable and executable".to_owned());
    }
    let bytes = header.data(endian, data).map_err(|()| "a segment reaches past the end of the file".to_owned())?;
    if bytes.len() as u64 > size {
        return Err("a segment is larger in the file than in memory".to_owned());
    }
    let end = start.checked_add(size).filter(|&end| end <= MAX_IMAGE);
    let end = end.ok_or_else(|| format!("a segment reaches past {} MiB", MAX_IMAGE >> 20))?.next_multiple_of(PAGE_SIZE);
    if !start.is_multiple_of(PAGE_SIZE) || start < after {
        return Err("a segment does not begin on a page of its own".to_owned());
    }
    Ok(Segment { range: start..end, rights, bytes: Cow::Borrowed(bytes) })
}

/// Where the relocations are in the image: address and length.
fn relocations(dynamic: &[elf::Dyn64<LittleEndian>], endian: LittleEndian) -> Result<Range<u64>, String> {
    let (mut address, mut length) = (0, 0);
    for entry in dynamic {
        let value = entry.d_val(endian);
        match entry.d_tag(endian) {
            elf::DT_NULL => break,
            elf::DT_RELA => address = value,
            elf::DT_RELASZ => length = value,
            elf::DT_RELAENT if value != RELA_SIZE as u64 => return Err("its relocations are of unknown size".into()),
            elf::DT_NEEDED => return Err("it needs a shared library".to_owned()),
            elf::DT_REL | elf::DT_RELR | elf::DT_JMPREL => {
                return Err("it has relocations of a kind that is not supported".to_owned());
            }
            elf::DT_INIT | elf::DT_INIT_ARRAY | elf::DT_PREINIT_ARRAY => {
                return Err("it has initializers".to_owned());
            }
            _ => {}
        }
    }
    let end = address.checked_add(length).ok_or("its relocations reach past the end of memory")?;
    Ok(address..end)
}

/// Relocate a module of `length` bytes to `base`.
fn relocate(segments: &mut [Segment<'_>], (base, length): (u64, u64), table: &Range<u64>) -> Result<(), String> {
    let holder = segments.iter().find(|segment| segment.range.contains(&table.start));
    let entries = holder.and_then(|segment| {
        segment.bytes.get(index(table.start - segment.range.start)..index(table.end - segment.range.start))
    });
    if entries.is_none() && !table.is_empty() {
        return Err("its relocations lie outside the image".to_owned());
    }
    for relocation in entries.unwrap_or_default().to_vec().chunks(RELA_SIZE) {
        let number =
            |at: usize| relocation.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        let (Some(offset), Some(info), Some(addend)) = (number(0), number(8), number(16)) else {
            return Err("its relocations end in the middle of one".to_owned());
        };
        if info != u64::from(elf::R_X86_64_RELATIVE.0) {
            return Err(format!("it has a relocation of type {}, which is not relative", info & 0xffff_ffff));
        }
        let end = offset.checked_add(8).ok_or("a relocation lies outside the image")?;
        let inside = |segment: &&mut Segment<'_>| {
            !segment.rights.execute && segment.range.contains(&offset) && end <= segment.range.end
        };
        let segment = segments.iter_mut().find(inside).filter(|_| addend <= length);
        let segment = segment.ok_or("a relocation lies, or points, outside the image's data")?;
        let (from, to) = (index(offset - segment.range.start), index(end - segment.range.start));
        let bytes = segment.bytes.to_mut();
        if bytes.len() < to {
            bytes.resize(to, 0);
        }
        if let Some(target) = bytes.get_mut(from..to) {
            target.copy_from_slice(&(base + addend).to_le_bytes());
        }
    }
    Ok(())
}

/// An offset into a segment, which is checked to be small.
fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    static CORE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/core-module.elf"));
    const BASE: u64 = 0x10_1000;
    /// Offset of the first program header, and of fields in it.
    const SEGMENT: usize = 64;
    const FLAGS: usize = 4;
    const OFFSET: usize = 8;
    const ADDRESS: usize = 16;
    const FILE_SIZE: usize = 32;
    const MEMORY_SIZE: usize = 40;

    fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut elf = CORE.to_vec();
        elf[at..at + bytes.len()].copy_from_slice(bytes);
        elf
    }

    fn error(elf: &[u8]) -> String {
        load(elf, BASE).map_or_else(|e| e, |_| String::from("loaded"))
    }

    #[test]
    fn the_core_loads() {
        let loaded = load(CORE, BASE).unwrap();
        let rights: Vec<Rights> = loaded.segments.iter().map(|segment| segment.rights).collect();
        assert_eq!(rights, [Rights::CODE, Rights::READ, Rights::DATA]);
        assert!(loaded.segments[0].range.contains(&loaded.entry));
        assert_eq!(loaded.segments[2].range.end, BASE + loaded.length);
        // Only what has addresses in it is copied.
        assert!(matches!(loaded.segments[0].bytes, Cow::Borrowed(_)));
    }

    #[test]
    fn where_the_module_lies_in_memory_does_not_matter() {
        let aligned = load(CORE, BASE).unwrap();
        for shift in 1..8 {
            let mut bytes = vec![0; shift];
            bytes.extend_from_slice(CORE);
            assert!(load(&bytes[shift..], BASE).unwrap() == aligned, "shifted by {shift}");
        }
    }

    #[test]
    fn damage_is_named() {
        assert!(error(b"").contains("not a 64-bit ELF"));
        assert!(error(b"garbage, and more of it, until it is as long as a header, which is 64 bytes").contains("ELF"));
        assert!(error(&patched(4, &[1])).contains("ELF"), "class");
        assert!(error(&patched(5, &[2])).contains("endian"), "byte order");
        assert!(error(&patched(16, &[2])).contains("position-independent"), "type");
        assert!(error(&patched(18, &[3])).contains("x86-64"), "machine");
        assert!(error(&patched(24, &0x7f_0000_u64.to_le_bytes())).contains("entry"));
        assert!(error(&patched(SEGMENT + FLAGS, &[7])).contains("writable and executable"));
        assert!(error(&patched(SEGMENT + OFFSET, &u64::MAX.to_le_bytes())).contains("past the end of the file"));
        assert!(error(&patched(SEGMENT + ADDRESS, &8_u64.to_le_bytes())).contains("page of its own"));
        assert!(error(&patched(SEGMENT + MEMORY_SIZE, &1_u64.to_le_bytes())).contains("larger in the file"));
        assert!(error(&patched(SEGMENT + MEMORY_SIZE, &u64::MAX.to_le_bytes())).contains("16 MiB"));
        assert!(error(&patched(SEGMENT + MEMORY_SIZE, &(15_u64 << 20).to_le_bytes())).contains("page of its own"));
        assert!(error(&patched(SEGMENT, &[3])).contains("dynamic linker"));
        assert!(error(&patched(SEGMENT, &[7])).contains("thread-local"));
        assert!(error(&patched(SEGMENT + FILE_SIZE, &u64::MAX.to_le_bytes())).contains("past the end of the file"));
        assert!(error(&CORE[..CORE.len() / 2]) != "loaded");
    }

    #[test]
    fn no_damage_of_any_byte_panics() {
        // The headers byte by byte, the rest here and there; truncation at every kind of place.
        for at in (0..400).chain((400..CORE.len()).step_by(61)) {
            for value in [0, 1, 0x7f, 0xff] {
                let _ = load(&patched(at, &[value]), BASE);
            }
            let _ = load(&CORE[..at], BASE);
        }
    }

    #[test]
    fn only_relative_relocations_are_taken() {
        let loaded = load(CORE, 0).unwrap();
        let relative = u64::from(elf::R_X86_64_RELATIVE.0).to_le_bytes();
        // The table in the file: find its first entry's type after an offset that is in the image.
        let at = (0x3000..CORE.len() - 24)
            .step_by(8)
            .find(|&at| {
                let offset = u64::from_le_bytes(CORE[at..at + 8].try_into().unwrap());
                CORE[at + 8..at + 16] == relative && offset > 0 && offset < loaded.length
            })
            .unwrap();
        assert!(error(&patched(at + 8, &6_u64.to_le_bytes())).contains("not relative"));
        assert!(error(&patched(at, &8_u64.to_le_bytes())).contains("outside the image's data"), "into the text");
        assert!(error(&patched(at, &u64::MAX.to_le_bytes())).contains("outside"));
        assert!(error(&patched(at + 16, &u64::MAX.to_le_bytes())).contains("outside"));
    }
}
