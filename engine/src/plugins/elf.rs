//! Checks of a library before the dynamic loader sees it.
//!
//! The dynamic loader trusts the headers: a truncated library kills the process with SIGBUS on first touch, and any library
//! runs its constructors. So only a complete shared object for this machine that exports the root module header is loaded.

use crate::error::reason;
use object::elf::{
    FileHeader64, EM_X86_64, ET_DYN, PT_DYNAMIC, PT_LOAD, SHN_UNDEF, SHT_DYNSYM, SHT_NOBITS, SHT_NULL, STT_OBJECT,
};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, Sym};
use object::read::{ReadCache, ReadCacheOps, ReadRef};
use object::Endianness;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A root-module header begins with the 40 bytes by which `abi_stable` recognizes itself.
const LEAST_HEADER_SIZE: u64 = 40;

/// Bytes that are read at once: with one read more, of the section headers, all that is looked at.
const BEGIN: usize = 4096;

/// Check the library in `file`, `length` bytes long.
///
/// # Errors
/// One clause that says what it is instead of a plugin.
pub fn check_library(file: &File, length: u64, symbol: &str) -> Result<(), String> {
    let mut begin = vec![0; BEGIN];
    let known = file.read_at(&mut begin, 0).map_err(|error| format!("it cannot be read: {}", reason(&error)))?;
    begin.truncate(known);
    let cache = ReadCache::new(Reader { file, length, begin, at: 0 });
    check(&cache, length, symbol)
}

/// A file of which the beginning is known: headers and dynamic symbols are there, and are asked for one by one.
struct Reader<'f> {
    file: &'f File,
    length: u64,
    begin: Vec<u8>,
    at: u64,
}

impl ReadCacheOps for Reader<'_> {
    fn len(&mut self) -> Result<u64, ()> {
        Ok(self.length)
    }

    fn seek(&mut self, position: u64) -> Result<u64, ()> {
        self.at = position;
        Ok(position)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ()> {
        let known = usize::try_from(self.at).ok().and_then(|at| self.begin.get(at..)).unwrap_or_default();
        let read = match known.get(..buffer.len()) {
            Some(known) => {
                buffer.copy_from_slice(known);
                buffer.len()
            }
            None => self.file.read_at(buffer, self.at).map_err(|_| ())?,
        };
        self.at = self.at.checked_add(read as u64).ok_or(())?;
        Ok(read)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), ()> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.read(rest)? {
                0 => return Err(()),
                read => done += read,
            }
        }
        Ok(())
    }
}

pub(super) fn check<'data, R: ReadRef<'data>>(data: R, length: u64, symbol: &str) -> Result<(), String> {
    let not_elf = |_| "it is not an ELF file for 64-bit x86".to_owned();
    let header = FileHeader64::<Endianness>::parse(data).map_err(not_elf)?;
    let endian = header.endian().map_err(not_elf)?;
    if endian != Endianness::Little || header.e_machine(endian) != EM_X86_64 {
        return Err("it is built for another machine, not 64-bit x86".to_owned());
    }
    if header.e_type(endian) != ET_DYN {
        return Err("it is an ELF file, but not a shared library".to_owned());
    }
    let damaged = |what: &str| format!("it is damaged: {what}");
    let inside = |offset: u64, size: u64| offset.checked_add(size).is_some_and(|end| end <= length);

    let segments =
        header.program_headers(endian, data).map_err(|_| damaged("its program headers are outside the file"))?;
    let mut dynamic = false;
    for segment in segments {
        if !inside(segment.p_offset(endian), segment.p_filesz(endian)) {
            return Err(damaged("a segment lies outside the file; it may be truncated"));
        }
        dynamic |= segment.p_type(endian) == PT_DYNAMIC;
    }
    if !dynamic || !segments.iter().any(|s| s.p_type(endian) == PT_LOAD) {
        return Err("it is an ELF file, but not a shared library".to_owned());
    }

    let sections = header
        .section_headers(endian, data)
        .map_err(|_| damaged("its section headers are outside the file; it may be truncated"))?;
    for section in sections {
        let kind = section.sh_type(endian);
        if kind != SHT_NOBITS && kind != SHT_NULL && !inside(section.sh_offset(endian), section.sh_size(endian)) {
            return Err(damaged("a section lies outside the file; it may be truncated"));
        }
    }
    if exports(header, endian, data, symbol).ok_or_else(|| damaged("its symbol table is unreadable"))? {
        Ok(())
    } else {
        Err("it is not an instar plugin: it does not export a plugin header".to_owned())
    }
}

/// Whether `symbol` is defined in the dynamic symbol table as an object that is large enough.
fn exports<'data, R: ReadRef<'data>>(
    header: &'data FileHeader64<Endianness>,
    endian: Endianness,
    data: R,
    symbol: &str,
) -> Option<bool> {
    let sections = header.sections(endian, data).ok()?;
    let table = sections.symbols(endian, data, SHT_DYNSYM).ok()?;
    for entry in table.iter() {
        if entry.st_shndx(endian) != SHN_UNDEF
            && entry.st_type() == STT_OBJECT
            && entry.st_size(endian) >= LEAST_HEADER_SIZE
            && table.symbol_name(endian, entry).ok()? == symbol.as_bytes()
        {
            return Some(true);
        }
    }
    Some(false)
}
