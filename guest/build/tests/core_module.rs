//! The helper on a real guest module: what the ELF is made of, and that its bytes are reproducible.
#![allow(clippy::unwrap_used)]

use instar_guest_build::GuestModule;
use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::LittleEndian;
use std::path::{Path, PathBuf};

fn build(name: &str) -> (PathBuf, Vec<PathBuf>) {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let module = GuestModule::new("instar-guest-core", "../core", "core-module");
    module.out_dir(root.join("out")).target_dir(root.join("guest")).try_build().unwrap()
}

#[test]
fn the_module_is_what_the_loader_takes_and_reproducible() {
    let (elf, sources) = build("first");
    let bytes = std::fs::read(elf).unwrap();
    let header = FileHeader64::<LittleEndian>::parse(&*bytes).unwrap();
    let endian = header.endian().unwrap();
    assert_eq!(header.e_type(endian), elf::ET_DYN);

    let mut flags = Vec::new();
    for segment in header.program_headers(endian, &*bytes).unwrap() {
        assert_ne!(segment.p_type(endian), elf::PT_INTERP);
        if segment.p_type(endian) == elf::PT_LOAD {
            assert_eq!(segment.p_vaddr(endian) % 4096, 0);
            flags.push(segment.p_flags(endian));
        }
    }
    assert_eq!(flags, [elf::PF_R | elf::PF_X, elf::PF_R, elf::PF_R | elf::PF_W]);

    let mut relocations = 0;
    for section in header.sections(endian, &*bytes).unwrap().iter() {
        assert!(section.rel(endian, &*bytes).unwrap().is_none());
        for relocation in section.rela(endian, &*bytes).unwrap().map_or(&[][..], |(list, _)| list) {
            assert_eq!(relocation.r_type(endian, false), elf::R_X86_64_RELATIVE);
            relocations += 1;
        }
    }
    assert!(relocations > 0, "the call table at least is relocated");

    for part in ["core/src/machine.rs", "core/Cargo.toml", "sdk/src/lib.rs", "abi/src/lib.rs", "Cargo.lock"] {
        assert!(sources.iter().any(|source| source.ends_with(part)), "{part} is not watched");
    }

    let again = std::fs::read(build("second").0).unwrap();
    assert!(bytes == again, "another target directory gave other bytes");
    for folder in [env!("CARGO_MANIFEST_DIR"), env!("CARGO_TARGET_TMPDIR")] {
        let found = bytes.windows(folder.len()).any(|window| window == folder.as_bytes());
        assert!(!found, "the module names {folder}");
    }
}
