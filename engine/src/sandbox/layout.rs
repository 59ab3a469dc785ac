//! Fills guest memory with configuration and modules, and says what the guest may do with which part of it. How that is enforced
//! is the sandbox's: page tables, or mappings of a process.

use super::error::SandboxError;
use super::memory::{GuestRam, LARGE_PAGE};
use super::module::{self, Loaded};
use super::placed::Placed;
use super::plain::bytes;
use super::program::{ModuleSpec, Program};
use super::rights::Rights;
use instar_guest_abi::{
    worker_stack_top, ChainConfig, List, ModuleEntry, ModuleTable, OperationConfig, CHAIN_CONFIG_ADDR,
    CHAIN_CONFIG_MAGIC, CONFIG_END, FILE_TABLE_ADDR, MAX_FILE_DEVICES, MAX_MEMBERS, MAX_MODULES, MEMBER_TABLE_ADDR,
    MESSAGE_ADDR, MESSAGE_SIZE, MODULES_ADDR, MODULE_ABI_MAJOR, MODULE_TABLE_ADDR, MODULE_TABLE_MAGIC,
    OPERATION_CONFIG_ADDR, OPERATION_CONFIG_MAGIC, PAGE_SIZE, PAYLOAD_ADDR, PAYLOAD_SIZE, RING_ADDR, RING_SIZE,
    STACK_SIZE, STACK_TOP, WORKER_STACKS_ADDR, WORKER_STACK_SIZE,
};
use std::ops::Range;

/// Least heap that must be left when the modules are loaded, in bytes.
const MIN_HEAP: u64 = 32 << 20;

/// Memory that is ready to run.
#[derive(Debug)]
pub struct Layout {
    /// Where the guest starts.
    pub entry: u64,
    /// The heap.
    pub heap: Range<u64>,
    /// The modules in the order of the table.
    pub modules: Vec<Placed>,
    /// All that the guest can reach, page by page, and what it may do there. No two overlap.
    pub mappings: Vec<(Range<u64>, Rights)>,
}

fn invalid(name: &str, text: impl Into<String>) -> SandboxError {
    SandboxError::ModuleInvalid { name: crate::sandbox::error::printable(name), text: text.into() }
}

/// Where the bytes of a guest are put, which are zero so far.
pub trait Place {
    /// Put these bytes at this address, whose pages have these rights; `false` if they do not fit.
    #[must_use]
    fn place(&self, address: u64, bytes: &[u8], rights: Rights) -> bool;
}

impl Place for GuestRam {
    fn place(&self, address: u64, bytes: &[u8], _: Rights) -> bool {
        self.write(address, bytes)
    }
}

/// Put everything that `spec` names into `memory`, with this core, for this number of workers.
///
/// # Errors
/// [`SandboxError::ModuleInvalid`] for a module that cannot be loaded.
pub fn fill(
    memory: &dyn Place,
    core: ModuleSpec<'_>,
    workers: usize,
    spec: &Program<'_>,
) -> Result<Layout, SandboxError> {
    let mut table = ModuleTable { magic: MODULE_TABLE_MAGIC, ..ModuleTable::default() };
    let mut mappings = Vec::new();
    let mut modules = Vec::new();
    // The page below each module stays unmapped.
    let mut next = MODULES_ADDR + PAGE_SIZE;
    for module in [spec.core.unwrap_or(core), spec.operation].iter().chain(&spec.modules) {
        let index = modules.len();
        let loaded = module::load(module.elf, next).map_err(|text| invalid(module.name, text))?;
        let entry = describe(module.name, &loaded)?;
        let slot = table.entries.get_mut(index);
        *slot.ok_or_else(|| invalid(module.name, format!("more than {MAX_MODULES} modules")))? = entry;
        let end = loaded.base + loaded.length;
        if end > WORKER_STACKS_ADDR - MIN_HEAP - LARGE_PAGE || !loaded.place(memory) {
            return Err(invalid(module.name, "there is no room for it in guest memory"));
        }
        mappings.extend(loaded.segments.into_iter().map(|segment| (segment.range, segment.rights)));
        let (name, version) = (module.name.to_owned(), module.version.to_owned());
        modules.push(Placed { name, version, range: loaded.base..end });
        next = end + PAGE_SIZE;
    }
    table.count = u32::try_from(modules.len()).unwrap_or(0);

    // It begins in the large page that the last module ends in: to touch one more takes as long as to load a module.
    // It ends at the same address however many workers there are: nothing in the guest depends on their number.
    let heap = next..WORKER_STACKS_ADDR;
    mappings.extend(regions(&heap));
    mappings.extend((1..=workers as u64).map(|worker| (worker_stack(worker), Rights::DATA)));
    if spec.payload.len() as u64 > PAYLOAD_SIZE
        || spec.members.len() > MAX_MEMBERS
        || spec.files.len() > MAX_FILE_DEVICES
    {
        return Err(SandboxError::Layout("the configuration is too long"));
    }
    let config = OperationConfig {
        magic: OPERATION_CONFIG_MAGIC,
        abi_major: MODULE_ABI_MAJOR,
        workers: u32::try_from(workers).unwrap_or(0),
        heap_start: heap.start,
        heap_end: heap.end,
        // SAFETY: it is written there below, in the guest's memory, read-only to it; nothing looks at it here.
        payload: unsafe { List::at(PAYLOAD_ADDR, spec.payload.len() as u64) },
    };
    // SAFETY: as above.
    let members = unsafe { List::at(MEMBER_TABLE_ADDR, spec.members.len() as u64) };
    let chain = ChainConfig { magic: CHAIN_CONFIG_MAGIC, members };
    let fits = [
        (OPERATION_CONFIG_ADDR, bytes(&[config])),
        (CHAIN_CONFIG_ADDR, bytes(&[chain])),
        (PAYLOAD_ADDR, spec.payload.as_slice()),
        (MODULE_TABLE_ADDR, bytes(&[table])),
        (FILE_TABLE_ADDR, bytes(&spec.files)),
        (MEMBER_TABLE_ADDR, bytes(&spec.members)),
    ]
    .into_iter()
    .all(|(address, bytes)| memory.place(address, bytes, Rights::READ));
    let entry = table.entries.first().map_or(0, |core| core.entry);
    if fits {
        Ok(Layout { entry, heap, modules, mappings })
    } else {
        Err(SandboxError::Layout("the configuration does not fit"))
    }
}

/// The regions besides the modules. Everything else is unmapped.
fn regions(heap: &Range<u64>) -> [(Range<u64>, Rights); 5] {
    [
        (OPERATION_CONFIG_ADDR..CONFIG_END, Rights::READ),
        (RING_ADDR..RING_ADDR + RING_SIZE, Rights::DATA),
        (MESSAGE_ADDR..MESSAGE_ADDR + MESSAGE_SIZE, Rights::DATA),
        (STACK_TOP - STACK_SIZE..STACK_TOP, Rights::DATA),
        (heap.clone(), Rights::DATA),
    ]
}

/// The stack of a worker, without the page below it.
fn worker_stack(worker: u64) -> Range<u64> {
    let top = worker_stack_top(worker);
    top - WORKER_STACK_SIZE + PAGE_SIZE..top
}

impl Loaded<'_> {
    /// Put it where it belongs, without the zeroes at the ends of its segments.
    fn place(&self, memory: &dyn Place) -> bool {
        self.segments.iter().all(|segment| {
            let used = segment.bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            memory.place(segment.range.start, &segment.bytes[..used], segment.rights)
        })
    }
}

fn describe(name: &str, loaded: &Loaded<'_>) -> Result<ModuleEntry, SandboxError> {
    let mut entry =
        ModuleEntry { entry: loaded.entry, base: loaded.base, length: loaded.length, ..ModuleEntry::default() };
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
    use super::*;
    use instar_guest_abi::{Member, GUEST_MEMORY_SIZE, MAX_WORKERS};

    const CORE: ModuleSpec<'static> = crate::sandbox::guest_module!("core");

    fn spec() -> Program<'static> {
        Program::new(
            crate::sandbox::guest_module!("commit"),
            vec![5, 6, 7],
            vec![Member { role: 77, ..Member::default() }; 3],
            vec![],
        )
    }

    #[test]
    fn every_page_has_the_least_rights() {
        let ram = GuestRam::new().unwrap();
        let layout = fill(&ram, CORE, 0, &spec()).unwrap();
        let mut runs = layout.mappings.clone();
        runs.sort_by_key(|(range, _)| range.start);
        assert!(runs.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start), "no two overlap");
        assert!(runs.iter().all(|(_, rights)| !(rights.write && rights.execute)), "never both");
        let module = |range: &Range<u64>| {
            layout.modules.iter().any(|m| m.range.start <= range.start && range.end <= m.range.end)
        };
        let (in_modules, others): (Vec<_>, Vec<_>) = runs.into_iter().partition(|(range, _)| module(range));
        assert_eq!(
            others,
            [
                (0x4_0000..0x5_3000, Rights::READ),
                (0x5_7000..0x5_f000, Rights::DATA),
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
    fn each_worker_has_a_stack_with_a_gap_below_it() {
        let ram = GuestRam::new().unwrap();
        let stacks = |workers| {
            let layout = fill(&ram, CORE, workers, &spec()).unwrap();
            let above = |range: &Range<u64>| range.start >= layout.heap.end;
            let stacks: Vec<_> = layout.mappings.iter().filter(|(range, _)| above(range)).cloned().collect();
            assert_eq!(ram.read_u64(OPERATION_CONFIG_ADDR + 8).map(|value| value >> 32), Some(workers as u64));
            (layout.heap, stacks)
        };
        let (heap, none) = stacks(0);
        let (same, some) = stacks(MAX_WORKERS);
        assert_eq!((heap, none.len(), some.len()), (same.clone(), 0, MAX_WORKERS));
        let ends = std::iter::once(same.end).chain(some.iter().map(|(range, _)| range.end));
        for (end, (range, rights)) in ends.zip(&some) {
            assert!(range.start >= end + PAGE_SIZE && range.end - range.start >= 128 << 10, "{range:x?}");
            assert_eq!(*rights, Rights::DATA);
        }
        assert_eq!(some.last().unwrap().0.end, GUEST_MEMORY_SIZE);
    }

    #[test]
    fn with_the_core_of_another_sandbox_all_other_modules_are_the_same_bytes() {
        let (one, other) = (GuestRam::new().unwrap(), GuestRam::new().unwrap());
        let process = crate::sandbox::guest_module!("process");
        assert!(CORE.elf != process.elf);
        let modules = vec![crate::sandbox::guest_module!("check"), crate::sandbox::guest_module!("map")];
        let program = Program { modules, ..spec() };
        let layouts = [fill(&one, CORE, 0, &program).unwrap(), fill(&other, process, 0, &program).unwrap()];
        // The text, and how large the rest is: what holds addresses is relocated to where the module is.
        let texts = |ram: &GuestRam, layout: &Layout| -> Vec<(String, u64, Vec<u8>)> {
            let text = |module: &Placed| {
                let inside = |range: &Range<u64>| module.range.contains(&range.start);
                let (range, _) =
                    layout.mappings.iter().find(|(range, rights)| rights.execute && inside(range)).unwrap();
                let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
                assert!(ram.read(range.start, &mut bytes));
                (module.name.clone(), module.range.end - module.range.start, bytes)
            };
            layout.modules.iter().map(text).collect()
        };
        let [one, other] = [texts(&one, &layouts[0]), texts(&other, &layouts[1])];
        assert_eq!(one.len(), 4);
        assert!(one[1..] == other[1..], "operation and formats");
        assert!(one[0] != other[0], "core");
    }

    #[test]
    fn the_guest_finds_its_configuration() {
        let ram = GuestRam::new().unwrap();
        let layout = fill(&ram, CORE, 0, &spec()).unwrap();
        assert_eq!(ram.read_u64(OPERATION_CONFIG_ADDR), Some(OPERATION_CONFIG_MAGIC));
        assert_eq!(ram.read_u64(CHAIN_CONFIG_ADDR), Some(CHAIN_CONFIG_MAGIC));
        assert_eq!(ram.read_u64(MODULE_TABLE_ADDR), Some(MODULE_TABLE_MAGIC));
        assert_eq!(ram.read_u64(MODULE_TABLE_ADDR + 8), Some(2), "modules");
        assert_eq!(ram.read_u64(OPERATION_CONFIG_ADDR + 16), Some(layout.heap.start));
        let list = |address| (ram.read_u64(address), ram.read_u64(address + 8));
        assert_eq!(list(OPERATION_CONFIG_ADDR + 32), (Some(PAYLOAD_ADDR), Some(3)));
        assert_eq!(ram.read_u64(PAYLOAD_ADDR), Some(0x07_0605));
        assert_eq!(list(CHAIN_CONFIG_ADDR + 8), (Some(MEMBER_TABLE_ADDR), Some(3)));
        assert_eq!(ram.read_u64(MEMBER_TABLE_ADDR + 2 * 88), Some(77), "the role of the last one");
    }

    #[test]
    fn modules_that_do_not_fit_are_refused() {
        let ram = GuestRam::new().unwrap();
        let core = CORE.elf;
        let module = |name, elf| ModuleSpec { name, version: "1.2.3", elf };
        let refuse = |modules: Vec<ModuleSpec<'static>>| {
            fill(&ram, CORE, 0, &Program { modules, ..spec() })
                .map_or_else(|e| e.to_string(), |_| String::from("loaded"))
        };
        assert!(refuse(vec![module("", core)]).contains("name"));
        assert!(refuse(vec![module("a-name-that-is-longer-than-the-field", core)]).contains("name"));
        assert!(refuse(vec![module("junk", b"junk")]).starts_with("guest module junk: it is not"));
        assert_eq!(refuse(vec![module("x", core); 14]), "loaded");
        assert!(refuse(vec![module("x", core); 15]).contains("more than 16"));
        let members = Program { members: vec![Member::default(); MAX_MEMBERS + 1], ..spec() };
        assert!(fill(&ram, CORE, 0, &members).is_err());
        assert!(fill(&ram, CORE, 0, &Program { payload: vec![0; 4097], ..spec() }).is_err());
    }
}
