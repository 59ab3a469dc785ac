//! What the host takes from a guest, and from files that claim to be modules or plugins.

use instar::devices::{Device, Devices};
use instar::fuzzing;
use instar::sandbox::BufferAccess;
use instar_guest_abi::{request_status, Phase, Request, DEVICE_OUTPUT};
use instar_guest_protocol::end_message::Outcome;
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::{
    check, commit, compare, map, EndMessage, FailureMessage, GuestMessage, LogMessage, Message, PanicMessage,
    PhaseMessage, ProgressMessage,
};
use instar_plugin_api::FormatPlugin;
use instar_testkit::padded;
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::VolatileSlice;

/// A guest module, and a plugin's library: an ELF whose first bytes or tables are anything.
pub fn elf(data: &[u8]) {
    const BASE: u64 = 0x10_1000;
    if let Ok(loaded) = fuzzing::load_module(data, BASE) {
        let mut last = BASE;
        for (range, write, execute) in &loaded.mappings {
            assert!(range.start >= last && range.end >= range.start, "{range:x?} after {last:x}");
            assert!(!(*write && *execute) && range.end <= BASE + loaded.length, "{range:x?}");
            last = range.end;
        }
        let entered = loaded.mappings.iter().any(|(range, _, execute)| *execute && range.contains(&loaded.entry));
        assert!(entered && loaded.length <= 17 << 20);
    }
    let _ = fuzzing::check_library(data);
}

/// A file that is both, as small as it can be: code, data with a relocation, and a plugin's symbol.
fn small_elf() -> Vec<u8> {
    const SYMBOL: &[u8] = b"\0_1as_0lib_1header_0root_bmodule_bloader\0";
    /// Offsets in the file; those of the segments are addresses from a page on, too.
    const CODE: u64 = 0x100;
    const DATA: u64 = 0x110;
    const SYMBOLS: u64 = 0x180;
    const STRINGS: u64 = 0x1b0;
    const SECTIONS: u64 = 0x200;
    let mut elf = vec![0; 0x200 + 3 * 64];
    let mut put = |at: u64, bytes: &[u8]| elf[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[3, 0, 62, 0, 1]);
    put(32, &64u64.to_le_bytes());
    put(40, &SECTIONS.to_le_bytes());
    put(52, &[64, 0, 56, 0, 3, 0, 64, 0, 3, 0, 2, 0]);
    // Type and flags, offset, address, size: to load and execute, to load and write, dynamic.
    for (index, (kind, flags, offset, address, size)) in
        [(1u32, 5u32, CODE, 0, 16u64), (1, 6, DATA, 0x1000, 88), (2, 6, DATA, 0x1000, 64)].into_iter().enumerate()
    {
        let at = 64 + 56 * index as u64;
        put(at, &[kind.to_le_bytes(), flags.to_le_bytes()].concat());
        let numbers = [offset, address, address, size, size, 4096];
        put(at + 8, &numbers.map(u64::to_le_bytes).concat());
    }
    // DT_RELA, DT_RELASZ, DT_RELAENT, DT_NULL, and the relocation.
    put(DATA, &[7u64, 0x1040, 8, 24, 9, 24, 0, 0, 0x1000, 8, 4].map(u64::to_le_bytes).concat());
    // Its name, an object in a section, 40 bytes.
    put(SYMBOLS + 24, &[1, 0, 0, 0, 0x11, 0, 1, 0]);
    put(SYMBOLS + 40, &40u64.to_le_bytes());
    put(STRINGS, SYMBOL);
    for (index, (kind, offset, size, link, entry)) in
        [(11u32, SYMBOLS, 48u64, 2u32, 24u64), (3, STRINGS, SYMBOL.len() as u64, 0, 0)].into_iter().enumerate()
    {
        let at = SECTIONS + 64 * (1 + index as u64);
        put(at + 4, &kind.to_le_bytes());
        put(at + 24, &[offset, size].map(u64::to_le_bytes).concat());
        put(at + 40, &[link.to_le_bytes(), 1u32.to_le_bytes()].concat());
        put(at + 56, &entry.to_le_bytes());
    }
    elf
}

/// Headers and tables: small ones, and those at the beginning of a real module.
#[must_use]
pub fn elf_seeds() -> Vec<Vec<u8>> {
    let module = instar_plugin_raw::Raw::guest_module();
    vec![small_elf(), module.elf.as_slice()[..ELF_BYTES].to_vec()]
}

/// Longest file that is tried, in bytes.
pub const ELF_BYTES: usize = 4096;

/// Messages as a guest sends them: each with its length in front, in two bytes.
pub fn messages(data: &[u8]) {
    let (ended, map) = fuzzing::messages(data);
    for text in ended {
        assert!(!text.chars().any(char::is_control), "a control character would reach the terminal: {text:?}");
    }
    if let Some(covered) = map {
        assert_eq!(covered, fuzzing::MAPPED, "the map does not cover the disk");
    }
}

/// One message of each kind.
#[must_use]
pub fn message_seeds() -> Vec<Vec<u8>> {
    let run = map::Run { start: 0, length: 1 << 20, depth: 0, kind: 1, device: 0, offset: 4096 };
    let half = map::Run { length: 1 << 19, kind: 2, ..run };
    let side = compare::Side { kind: 2, ..Default::default() };
    let pair = compare::Pair { start: 0, length: 1 << 20, first: Some(side), second: Some(side), equal: 0 };
    let runs = map::Runs { runs: vec![half, map::Run { start: 1 << 19, kind: 3, ..half }] };
    let plan = commit::Plan { clusters: 1, bytes: 2, ..Default::default() };
    let finding = check::Finding { kind: 1, text: "finding".into(), kept: false };
    let mends = check::Plan { corruptions: 1, leaks: 2, ..Default::default() };
    let failure = FailureMessage { error: 7, text: "x".into(), step: "plan".into(), ..Default::default() };
    let end = |outcome| Kind::End(EndMessage { outcome: Some(outcome) });
    let kinds = [
        end(Outcome::Failure(failure)),
        Kind::Progress(ProgressMessage { step: "empty".into(), done: 1, total: 2 }),
        Kind::Log(LogMessage { text: "line".into() }),
        Kind::Panic(PanicMessage { text: "panic".into(), address: 0 }),
        Kind::Event(commit::Event { kind: Some(commit::event::Kind::Plan(plan)) }.encode_to_vec()),
        Kind::Event(check::Event { kind: Some(check::event::Kind::Finding(finding)) }.encode_to_vec()),
        Kind::Event(check::Event { kind: Some(check::event::Kind::Plan(mends)) }.encode_to_vec()),
        end(Outcome::Result(check::Outcome { leaks: 1, ..Default::default() }.encode_to_vec())),
        Kind::Event(runs.encode_to_vec()),
        end(Outcome::Result(map::Outcome {}.encode_to_vec())),
        Kind::Phase(PhaseMessage { phase: 2 }),
        Kind::Event(compare::Pairs { pairs: vec![pair] }.encode_to_vec()),
    ];
    let framed = |kind: Kind| {
        let bytes = GuestMessage { kind: Some(kind) }.encode_to_vec();
        [&u16::try_from(bytes.len()).unwrap_or(0).to_be_bytes()[..], &bytes].concat()
    };
    let mut seeds: Vec<Vec<u8>> = kinds.into_iter().map(framed).collect();
    seeds.push([seeds[8].clone(), seeds[9].clone()].concat());
    seeds.push([seeds[4].clone(), seeds[1].clone(), seeds[0].clone()].concat());
    seeds
}

/// Where the heap of the guest begins, and its length in bytes.
const HEAP: u64 = 0x20_0000;
const HEAP_BYTES: usize = 1 << 16;
/// Length of each file in bytes, and how long the output may become.
const LENGTH: u64 = 1 << 14;
const LONGEST: u64 = 1 << 16;
/// Requests of one input.
const MAX_REQUESTS: usize = 64;

struct Heap(Vec<u8>);

impl BufferAccess for Heap {
    fn heap_slice(&self, address: u64, length: u64) -> Option<VolatileSlice<'_>> {
        let start = usize::try_from(address.checked_sub(HEAP)?).ok()?;
        let length = usize::try_from(length).ok()?;
        self.0.get(start..start.checked_add(length)?)?;
        // SAFETY: the range lies within the vector, which outlives the slice, and nothing else looks at it meanwhile.
        Some(unsafe { VolatileSlice::new(self.0.as_ptr().add(start).cast_mut(), length) })
    }
}

/// A request from 12 bytes: numbers that are mostly near what makes sense, and sometimes anything.
fn request(bytes: &[u8]) -> Request {
    let number = |at: usize| u64::from(bytes[at]) << 8 | u64::from(bytes[at + 1]);
    let wide = |at: usize| match bytes[at] {
        0xff => u64::MAX - number(at),
        0xfe => i64::MAX as u64 - (number(at) & 0xff),
        0xfd => 1 << (bytes[at + 1] % 64),
        _ => number(at) << 1,
    };
    let device = |byte: u8| [0, 1, DEVICE_OUTPUT, 0, 1, DEVICE_OUTPUT, 5, u32::MAX][usize::from(byte % 8)];
    Request {
        op: u32::from(bytes[0] % 9),
        device: device(bytes[1]),
        flags: if bytes[1] & 0x80 == 0 { 0 } else { u32::from(bytes[1] >> 3 & 15) },
        offset: wide(2),
        length: wide(4),
        buffer: HEAP.wrapping_add(wide(6)).wrapping_sub(u64::from(bytes[10])),
        src_device: device(bytes[11]),
        src_offset: wide(8),
        ..Request::default()
    }
}

fn temporary(bytes: &[u8]) -> File {
    let file = fuzzing::anonymous_file().expect("memory for a file");
    file.write_all_at(bytes, 0).expect("memory for a file");
    file
}

/// Batches of requests against real files: what breaks a rule ends the guest, nothing else is changed, nothing grows further
/// than it may, and what is executed is what was asked for, by a model of the files.
pub fn requests(data: &[u8]) {
    let content = |seed: u8| (0..LENGTH).map(|i| (i / 17) as u8 ^ seed).collect::<Vec<u8>>();
    let mut model = [content(1), content(2), content(3)];
    let files = [temporary(&model[0]), temporary(&model[1]), temporary(&model[2])];
    let slots = [(0, false, LENGTH), (1, true, LENGTH), (DEVICE_OUTPUT, true, LONGEST)];
    let mut devices = Devices::new();
    for ((slot, writable, longest), file) in slots.into_iter().zip(&files) {
        let file = file.try_clone().expect("a descriptor");
        devices.attach(slot, Device::new(file, writable, LENGTH, longest, false));
    }
    devices.enter(Phase::Target).expect("the first phase after looking");
    let mut heap = Heap((0..HEAP_BYTES).map(|i| (i % 251) as u8).collect());
    let all: Vec<Request> = data.chunks_exact(12).take(MAX_REQUESTS).map(request).collect();
    for batch in all.chunks(8) {
        let mut asked = batch.to_vec();
        asked.iter_mut().for_each(|request| request.status = request_status::NOT_RUN);
        let mut expected = heap.0.clone();
        let result = devices.execute(&heap, &mut asked);
        let done = asked.iter().take_while(|request| request.status == request_status::OK).count();
        for request in &asked[..done] {
            execute(&mut model, &mut expected, request);
        }
        assert!(heap.0 == expected, "a request has changed other memory: {:?}", &asked[..done]);
        heap.0 = expected;
        for (index, (file, model)) in files.iter().zip(&model).enumerate() {
            let length = file.metadata().map_or(0, |metadata| metadata.len());
            assert!(length <= slots[index].2, "file {index} has {length} bytes");
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
            file.read_exact_at(&mut bytes, 0).expect("the file is there");
            let differs = bytes.iter().zip(model).position(|(is, should)| is != should);
            let lengths = (bytes.len(), model.len());
            assert!(bytes == *model, "file {index} differs at {differs:?} of {lengths:?} after {asked:?}");
        }
        if result.is_err() || done < asked.len() {
            return;
        }
    }
}

/// What a request that was executed does, by the description of the ring.
fn execute(files: &mut [Vec<u8>; 3], heap: &mut [u8], request: &Request) {
    let index = |device: u32| if device == DEVICE_OUTPUT { 2 } else { device as usize };
    let (offset, length) = (request.offset as usize, request.length as usize);
    let target = index(request.device);
    let read = |file: &[u8], at: usize, length: usize| padded(file.get(at..).unwrap_or_default(), length);
    let write = |file: &mut Vec<u8>, offset: usize, bytes: &[u8]| {
        if !bytes.is_empty() {
            file.resize(file.len().max(offset + bytes.len()), 0);
            file[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    };
    match request.op {
        op if op == instar_guest_abi::RequestOp::Read as u32 => {
            let at = (request.buffer - HEAP) as usize;
            heap[at..at + length].copy_from_slice(&read(&files[target], offset, length));
        }
        op if op == instar_guest_abi::RequestOp::Write as u32 => {
            let at = (request.buffer - HEAP) as usize;
            write(&mut files[target], offset, &heap[at..at + length]);
        }
        op if op == instar_guest_abi::RequestOp::Copy as u32 => {
            let bytes = read(&files[index(request.src_device)], request.src_offset as usize, length);
            write(&mut files[target], offset, &bytes);
        }
        op if op == instar_guest_abi::RequestOp::Zero as u32 => {
            let file = &mut files[target];
            let end = offset.saturating_add(length).min(file.len());
            if let Some(range) = file.get_mut(offset.min(end)..end) {
                range.fill(0);
            }
        }
        op if op == instar_guest_abi::RequestOp::SetLength as u32 => files[target].resize(offset, 0),
        _ => {}
    }
}

/// Batches of each kind of request.
#[must_use]
pub fn request_seeds() -> Vec<Vec<u8>> {
    (0..32u8)
        .map(|seed| {
            let one = |n: u8| {
                let n = n.wrapping_mul(37).wrapping_add(seed.wrapping_mul(11));
                [n % 7, 1 + n % 2, n % 32, n, n % 8, 0, n % 64, 0, n % 16, n, 0, n % 3]
            };
            (0..8).flat_map(one).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise the target would try nothing but refusals.
    #[test]
    fn the_small_file_is_a_module_and_a_library() {
        let elf = small_elf();
        let loaded = fuzzing::load_module(&elf, 0x10_1000).unwrap();
        assert_eq!((loaded.entry, loaded.length, loaded.mappings.len()), (0x10_1000, 0x2000, 2));
        assert_eq!(fuzzing::check_library(&elf), Ok(()));
    }
}
