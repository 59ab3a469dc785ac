//! Loads a guest module: checks the ELF, places and relocates it. Modules come from plugins, which are trusted code,
//! but may be damaged; whatever the bytes are, the answer is an image or a sentence.

use super::rights::Rights;
use instar_guest_abi::PAGE_SIZE;
use object::elf::{self, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::LittleEndian;
use std::ops::Range;

/// Largest module image in bytes.
const MAX_IMAGE: u64 = 16 << 20;
const RELA_SIZE: usize = 24;

type Header = FileHeader64<LittleEndian>;
type Segment = elf::ProgramHeader64<LittleEndian>;

/// A module, placed and relocated.
#[derive(Debug)]
pub struct Loaded {
    /// Address of the first byte of `image`.
    pub base: u64,
    /// The bytes, a whole number of pages.
    pub image: Vec<u8>,
    /// Address of the entry.
    pub entry: u64,
    /// How its pages are to be mapped.
    pub mappings: Vec<(Range<u64>, Rights)>,
}

/// Load the ELF in `data` at `base`, a page address.
///
/// # Errors
/// One clause that says what is wrong with it.
pub fn load(data: &[u8], base: u64) -> Result<Loaded, String> {
    let header = Header::parse(data).map_err(|e| format!("it is not a 64-bit ELF file: {e}"))?;
    let endian = header.endian().map_err(|_| "it is not a little-endian ELF file".to_owned())?;
    if header.e_machine(endian) != elf::EM_X86_64 || header.e_type(endian) != elf::ET_DYN {
        return Err("it is not a position-independent x86-64 ELF file".to_owned());
    }
    let segments = header.program_headers(endian, data).map_err(|e| format!("its program headers: {e}"))?;
    let mut image = Vec::new();
    let mut parts: Vec<(Range<u64>, Rights)> = Vec::new();
    for segment in segments {
        match segment.p_type(endian) {
            elf::PT_LOAD => {
                let after = parts.last().map_or(0, |(range, _)| range.end);
                parts.push(place(segment, endian, data, after, &mut image)?);
            }
            elf::PT_INTERP => return Err("it asks for a dynamic linker".to_owned()),
            elf::PT_TLS => return Err("it has thread-local storage".to_owned()),
            _ => {}
        }
    }
    if parts.is_empty() {
        return Err("it has nothing to load".to_owned());
    }
    for segment in segments {
        if let Some(dynamic) = segment.dynamic(endian, data).map_err(|e| format!("its dynamic section: {e}"))? {
            relocate(&mut image, &parts, base, &relocations(dynamic, endian)?)?;
        }
    }
    let entry = header.e_entry(endian);
    if !parts.iter().any(|(range, rights)| rights.execute && range.contains(&entry)) {
        return Err("its entry is not in executable code".to_owned());
    }
    let mappings = parts.into_iter().map(|(range, rights)| (range.start + base..range.end + base, rights)).collect();
    Ok(Loaded { base, image, entry: entry + base, mappings })
}

/// Copy one segment into the image; returns its pages and rights. `after` is the end of the segment before.
fn place(
    segment: &Segment,
    endian: LittleEndian,
    data: &[u8],
    after: u64,
    image: &mut Vec<u8>,
) -> Result<(Range<u64>, Rights), String> {
    let (start, size) = (segment.p_vaddr(endian), segment.p_memsz(endian));
    let flags = segment.p_flags(endian);
    let has = |flag: elf::ProgramFlags| flags.0 & flag.0 != 0;
    let rights = Rights { user: true, write: has(elf::PF_W), execute: has(elf::PF_X) };
    if rights.write && rights.execute {
        return Err("a segment is both writable and executable".to_owned());
    }
    let file = segment.data(endian, data).map_err(|()| "a segment reaches past the end of the file".to_owned())?;
    if file.len() as u64 > size {
        return Err("a segment is larger in the file than in memory".to_owned());
    }
    let end = start.checked_add(size).filter(|&end| end <= MAX_IMAGE);
    let end = end.ok_or_else(|| format!("a segment reaches past {} MiB", MAX_IMAGE >> 20))?.next_multiple_of(PAGE_SIZE);
    if !start.is_multiple_of(PAGE_SIZE) || start < after {
        return Err("a segment does not begin on a page of its own".to_owned());
    }
    image.resize(index(end), 0);
    if let Some(target) = image.get_mut(index(start)..index(start) + file.len()) {
        target.copy_from_slice(file);
    }
    Ok((start..end, rights))
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

fn relocate(image: &mut [u8], parts: &[(Range<u64>, Rights)], base: u64, table: &Range<u64>) -> Result<(), String> {
    if table.end > image.len() as u64 {
        return Err("its relocations lie outside the image".to_owned());
    }
    let table = image.get(index(table.start)..index(table.end)).unwrap_or_default().to_vec();
    for relocation in table.chunks(RELA_SIZE) {
        let number =
            |at: usize| relocation.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        let (Some(offset), Some(info), Some(addend)) = (number(0), number(8), number(16)) else {
            return Err("its relocations end in the middle of one".to_owned());
        };
        if info != u64::from(elf::R_X86_64_RELATIVE.0) {
            return Err(format!("it has a relocation of type {}, which is not relative", info & 0xffff_ffff));
        }
        let end = offset.checked_add(8).ok_or("a relocation lies outside the image")?;
        let inside =
            |(range, rights): &&(Range<u64>, Rights)| !rights.execute && range.contains(&offset) && end <= range.end;
        if parts.iter().find(inside).is_none() || addend > image.len() as u64 {
            return Err("a relocation lies, or points, outside the image's data".to_owned());
        }
        if let Some(target) = image.get_mut(index(offset)..index(end)) {
            target.copy_from_slice(&(base + addend).to_le_bytes());
        }
    }
    Ok(())
}

/// An offset into the image, which is checked to be small.
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
        let rights: Vec<Rights> = loaded.mappings.iter().map(|(_, rights)| *rights).collect();
        assert_eq!(rights, [Rights::CODE, Rights::READ, Rights::DATA]);
        assert!(loaded.mappings[0].0.contains(&loaded.entry));
        assert_eq!(loaded.mappings[2].0.end, BASE + loaded.image.len() as u64);
    }

    #[test]
    fn where_the_module_lies_in_memory_does_not_matter() {
        let aligned = load(CORE, BASE).unwrap();
        for shift in 1..8 {
            let mut bytes = vec![0; shift];
            bytes.extend_from_slice(CORE);
            let loaded = load(&bytes[shift..], BASE).unwrap();
            assert!(loaded.image == aligned.image && loaded.entry == aligned.entry, "shifted by {shift}");
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
                CORE[at + 8..at + 16] == relative && offset > 0 && offset < loaded.image.len() as u64
            })
            .unwrap();
        assert!(error(&patched(at + 8, &6_u64.to_le_bytes())).contains("not relative"));
        assert!(error(&patched(at, &8_u64.to_le_bytes())).contains("outside the image's data"), "into the text");
        assert!(error(&patched(at, &u64::MAX.to_le_bytes())).contains("outside"));
        assert!(error(&patched(at + 16, &u64::MAX.to_le_bytes())).contains("outside"));
    }
}
