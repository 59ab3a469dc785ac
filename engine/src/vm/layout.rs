//! Fills guest memory: the supervisor's pages, configuration, modules, page tables.

use super::elf::{self, Loaded};
use super::error::VmError;
use super::memory::{GuestRam, LARGE_PAGE};
use super::pages::{PageTables, Rights};
use super::plain::{bytes, Plain};
use super::spec::{ModuleSpec, VmSpec};
use super::system;
use instar_guest_abi::{
    CommitConfig, ModuleEntry, ModuleTable, CHAIN_CONFIG_ADDR, CHAIN_CONFIG_MAGIC, COMMIT_CONFIG_MAGIC, CONFIG_END,
    FILE_TABLE_ADDR, GUEST_MEMORY_SIZE, MAX_FILE_DEVICES, MAX_MODULES, MESSAGE_ADDR, MESSAGE_SIZE, MODULES_ADDR,
    MODULE_ABI_MAJOR, MODULE_TABLE_ADDR, MODULE_TABLE_MAGIC, OPERATION_CONFIG_ADDR, PAGE_SIZE, PAGE_TABLES_ADDR,
    RING_ADDR, RING_SIZE, STACK_SIZE, STACK_TOP, SYSTEM_ADDR,
};
use std::ops::Range;

/// Least heap that must be left when the modules are loaded, in bytes.
const MIN_HEAP: u64 = 32 << 20;

/// Where a module is.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Its name.
    pub name: String,
    /// Its image.
    pub range: Range<u64>,
}

/// Memory that is ready to run.
#[derive(Debug)]
pub struct Layout {
    /// Where the vCPU starts.
    pub entry: u64,
    /// The heap.
    pub heap: Range<u64>,
    /// The modules in the order of the table.
    pub modules: Vec<Placed>,
}

fn invalid(name: &str, text: impl Into<String>) -> VmError {
    VmError::ModuleInvalid { name: super::error::printable(name), text: text.into() }
}

/// Load everything that `spec` names into `ram`.
///
/// # Errors
/// [`VmError::ModuleInvalid`] for a module that cannot be loaded.
pub fn fill(ram: &GuestRam, spec: &VmSpec<'_>) -> Result<Layout, VmError> {
    let mut table = ModuleTable { magic: MODULE_TABLE_MAGIC, ..ModuleTable::default() };
    let mut tables = PageTables::new();
    let mut modules = Vec::new();
    // The page below each module stays unmapped.
    let mut next = MODULES_ADDR + PAGE_SIZE;
    let own = [ModuleSpec { name: "core", elf: spec.core }, ModuleSpec { name: "commit", elf: spec.operation }];
    for module in own.iter().chain(&spec.modules) {
        let index = modules.len();
        let loaded = elf::load(module.elf, next).map_err(|text| invalid(module.name, text))?;
        let entry = describe(module.name, &loaded)?;
        let slot = table.entries.get_mut(index);
        *slot.ok_or_else(|| invalid(module.name, format!("more than {MAX_MODULES} modules")))? = entry;
        let end = loaded.base + loaded.image.len() as u64;
        if end > GUEST_MEMORY_SIZE - MIN_HEAP - LARGE_PAGE || !ram.write(loaded.base, &loaded.image) {
            return Err(invalid(module.name, "there is no room for it in guest memory"));
        }
        for (range, rights) in loaded.mappings {
            map(&mut tables, &range, rights)?;
        }
        modules.push(Placed { name: module.name.to_owned(), range: loaded.base..end });
        next = end + PAGE_SIZE;
    }
    table.count = u32::try_from(modules.len()).unwrap_or(0);

    let heap = next.next_multiple_of(LARGE_PAGE)..GUEST_MEMORY_SIZE;
    for (range, rights) in system::MAPPINGS.into_iter().chain(regions(&heap)) {
        map(&mut tables, &range, rights)?;
    }
    let config = CommitConfig {
        magic: COMMIT_CONFIG_MAGIC,
        abi_major: MODULE_ABI_MAJOR,
        flags: spec.flags,
        heap_start: heap.start,
        heap_end: heap.end,
    };
    let mut chain = spec.chain;
    chain.magic = CHAIN_CONFIG_MAGIC;
    let fits = ram.write(SYSTEM_ADDR, &system::bytes())
        && ram.write(PAGE_TABLES_ADDR, &tables.bytes())
        && write_plain(ram, OPERATION_CONFIG_ADDR, config)
        && write_plain(ram, CHAIN_CONFIG_ADDR, chain)
        && write_plain(ram, MODULE_TABLE_ADDR, table)
        && spec.files.len() <= MAX_FILE_DEVICES
        && ram.write(FILE_TABLE_ADDR, bytes(&spec.files));
    let entry = table.entries.first().map_or(0, |core| core.entry);
    if fits {
        Ok(Layout { entry, heap, modules })
    } else {
        Err(VmError::unusable("filling guest memory", 0))
    }
}

/// The regions of ring 3 besides the modules. Everything else is unmapped.
fn regions(heap: &Range<u64>) -> [(Range<u64>, Rights); 5] {
    [
        (OPERATION_CONFIG_ADDR..CONFIG_END, Rights::READ),
        (RING_ADDR..RING_ADDR + RING_SIZE, Rights::DATA),
        (MESSAGE_ADDR..MESSAGE_ADDR + MESSAGE_SIZE, Rights::DATA),
        (STACK_TOP - STACK_SIZE..STACK_TOP, Rights::DATA),
        (heap.clone(), Rights::DATA),
    ]
}

fn map(tables: &mut PageTables, range: &Range<u64>, rights: Rights) -> Result<(), VmError> {
    tables.map(range.start, range.end, rights).ok_or_else(|| VmError::unusable("building the page tables", 0))
}

fn write_plain<T: Plain>(ram: &GuestRam, address: u64, value: T) -> bool {
    ram.write(address, bytes(&[value]))
}

fn describe(name: &str, loaded: &Loaded) -> Result<ModuleEntry, VmError> {
    let mut entry = ModuleEntry {
        entry: loaded.entry,
        base: loaded.base,
        length: loaded.image.len() as u64,
        ..ModuleEntry::default()
    };
    // One byte is left, so that the name ends.
    let room = entry.name.len() - 1;
    match entry.name.get_mut(..name.len()) {
        Some(target) if name.len() <= room && !name.is_empty() && !name.contains('\0') => {
            target.copy_from_slice(name.as_bytes());
        }
        _ => return Err(invalid(name, format!("its name is not 1 to {room} bytes"))),
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::pages::walk::walk;
    use super::*;
    use instar_guest_abi::{ChainConfig, PAGE_TABLES_SIZE};

    fn spec() -> VmSpec<'static> {
        VmSpec::new(5, ChainConfig::default(), vec![])
    }

    /// Every page of guest memory with its rights, as runs.
    fn runs(ram: &GuestRam) -> Vec<(Range<u64>, Rights)> {
        let mut tables = vec![0; usize::try_from(PAGE_TABLES_SIZE).unwrap()];
        assert!(ram.read(PAGE_TABLES_ADDR, &mut tables));
        let mut runs: Vec<(Range<u64>, Rights)> = Vec::new();
        for page in (0..GUEST_MEMORY_SIZE + LARGE_PAGE).step_by(4096) {
            let Some((target, rights)) = walk(&tables, page) else { continue };
            assert_eq!(target, page, "identity");
            match runs.last_mut() {
                Some((run, last)) if run.end == page && *last == rights => run.end += PAGE_SIZE,
                _ => runs.push((page..page + PAGE_SIZE, rights)),
            }
        }
        runs
    }

    #[test]
    fn every_page_has_the_least_rights() {
        let ram = GuestRam::new().unwrap();
        let layout = fill(&ram, &spec()).unwrap();
        let runs = runs(&ram);
        assert!(runs.iter().all(|(_, rights)| !(rights.write && rights.execute)), "never both");
        let module = |range: &Range<u64>| {
            layout.modules.iter().any(|m| m.range.start <= range.start && range.end <= m.range.end)
        };
        let (in_modules, others): (Vec<_>, Vec<_>) = runs.into_iter().partition(|(range, _)| module(range));
        assert_eq!(
            others,
            [
                (0x1000..0x2000, Rights::SYSTEM_READ),
                (0x2000..0x3000, Rights::SYSTEM_CODE),
                (0x4000..0x5000, Rights::SYSTEM_DATA),
                (0x4_0000..0x4_7000, Rights::READ),
                (0x5_0000..0x5_8000, Rights::DATA),
                (0x6_0000..0x6_4000, Rights::DATA),
                (0x8_0000..0x10_0000, Rights::DATA),
                (layout.heap.clone(), Rights::DATA),
            ]
        );
        let rights: Vec<Rights> = in_modules.iter().map(|(_, rights)| *rights).collect();
        let one = [Rights::CODE, Rights::READ, Rights::DATA];
        assert_eq!(rights, [one, one].concat(), "core and commit, with a gap between");
        assert!(layout.modules[0].range.end < layout.modules[1].range.start);
        assert!(in_modules[0].0.contains(&layout.entry));
        assert!(layout.heap.end - layout.heap.start >= MIN_HEAP);
    }

    #[test]
    fn the_guest_finds_its_configuration() {
        let ram = GuestRam::new().unwrap();
        let layout = fill(&ram, &spec()).unwrap();
        assert_eq!(ram.read_u64(OPERATION_CONFIG_ADDR), Some(COMMIT_CONFIG_MAGIC));
        assert_eq!(ram.read_u64(CHAIN_CONFIG_ADDR), Some(CHAIN_CONFIG_MAGIC));
        assert_eq!(ram.read_u64(MODULE_TABLE_ADDR), Some(MODULE_TABLE_MAGIC));
        assert_eq!(ram.read_u64(MODULE_TABLE_ADDR + 8), Some(2), "modules");
        assert_eq!(ram.read_u64(OPERATION_CONFIG_ADDR + 16), Some(layout.heap.start));
    }

    #[test]
    fn modules_that_do_not_fit_are_refused() {
        let ram = GuestRam::new().unwrap();
        let core = spec().core;
        let refuse = |modules: Vec<ModuleSpec<'static>>| {
            fill(&ram, &VmSpec { modules, ..spec() }).map_or_else(|e| e.to_string(), |_| String::from("loaded"))
        };
        assert!(refuse(vec![ModuleSpec { name: "", elf: core }]).contains("name"));
        assert!(refuse(vec![ModuleSpec { name: "a-name-that-is-longer-than-the-field", elf: core }]).contains("name"));
        assert!(refuse(vec![ModuleSpec { name: "junk", elf: b"junk" }]).starts_with("guest module junk: it is not"));
        assert_eq!(refuse(vec![ModuleSpec { name: "x", elf: core }; 14]), "loaded");
        assert!(refuse(vec![ModuleSpec { name: "x", elf: core }; 15]).contains("more than 16"));
    }
}
