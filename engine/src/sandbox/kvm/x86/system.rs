//! The supervisor's part of the guest: descriptor tables and the fault stubs. It holds no code that runs unless the
//! guest faults.

use crate::sandbox::rights::Rights;
use instar_guest_abi::{
    MAX_WORKERS, PAGE_SIZE, PORT_DOORBELL, PORT_EXIT, PORT_FAULT, PORT_IDLE, PORT_JOIN, PORT_MESSAGE, PORT_WAKE,
    SYSTEM_ADDR, SYSTEM_SIZE,
};
use std::ops::Range;

/// The global descriptor table.
pub const GDT: u64 = SYSTEM_ADDR;
/// The task state segment, on the same page.
pub const TSS: u64 = SYSTEM_ADDR + 0x100;
/// The interrupt descriptor table.
pub const IDT: u64 = SYSTEM_ADDR + 0x400;
/// The fault stubs.
pub const STUBS: u64 = SYSTEM_ADDR + PAGE_SIZE;
/// The page of the stacks that faults are delivered on: each processor has its part, from the top downwards.
pub const STACK: Range<u64> = SYSTEM_ADDR + 3 * PAGE_SIZE..SYSTEM_ADDR + 4 * PAGE_SIZE;
/// Bytes of a processor's part: the frame of a fault has 48, and no fault comes while one is reported.
const STACK_PART: u64 = 512;
/// The page of the workers' task state segments.
pub const TASKS: Range<u64> = SYSTEM_ADDR + 5 * PAGE_SIZE..SYSTEM_ADDR + 6 * PAGE_SIZE;
/// Bytes from one of them to the next.
const TASK_ROOM: u64 = 512;

const _: () = assert!(TASKS.end <= SYSTEM_ADDR + SYSTEM_SIZE);
const _: () =
    assert!(STACK_PART * (MAX_WORKERS as u64 + 1) <= PAGE_SIZE && TASK_ROOM * MAX_WORKERS as u64 <= PAGE_SIZE);
const _: () = assert!((TSS_LIMIT as u64) < TASK_ROOM);

/// Selectors.
pub const KERNEL_CODE: u16 = 0x08;
/// Data of ring 3.
pub const USER_DATA: u16 = 0x18 | 3;
/// Code of ring 3.
pub const USER_CODE: u16 = 0x20 | 3;
/// The task state segment.
pub const TASK: u16 = 0x28;

/// Number of vectors that the processor raises.
pub const VECTORS: u8 = 32;
/// Bytes of a fault stub.
const STUB_SIZE: u64 = 8;
/// Bytes of the task state segment before the I/O bitmap.
const TSS_SIZE: u16 = 104;
/// Bytes of the I/O bitmap: one bit for each port up to the last that the guest may use, and a last byte of ones.
const IO_BITMAP_SIZE: u16 = (PORT_IDLE + 3) / 8 + 2;
/// The ports that ring 3 may write to.
const PORTS: [u16; 6] = [PORT_DOORBELL, PORT_MESSAGE, PORT_EXIT, PORT_WAKE, PORT_JOIN, PORT_IDLE];

/// Last byte of the tables, relative to their start.
pub const GDT_LIMIT: u16 = 7 * 8 - 1;
/// As [`GDT_LIMIT`].
pub const IDT_LIMIT: u16 = VECTORS as u16 * 16 - 1;
/// As [`GDT_LIMIT`].
pub const TSS_LIMIT: u16 = TSS_SIZE + IO_BITMAP_SIZE - 1;

/// How the supervisor's pages are mapped.
pub const MAPPINGS: [(Range<u64>, Rights); 4] = [
    (GDT..STUBS, Rights::SYSTEM_READ),
    (STUBS..STUBS + PAGE_SIZE, Rights::SYSTEM_CODE),
    (STACK, Rights::SYSTEM_DATA),
    (TASKS, Rights::SYSTEM_READ),
];

/// The task state segment of a processor: 0 is the main one, workers count from 1.
pub fn task(processor: u64) -> u64 {
    processor.checked_sub(1).map_or(TSS, |worker| TASKS.start + worker * TASK_ROOM)
}

/// The content of that segment.
fn task_bytes(processor: u64) -> Vec<u8> {
    let stack = STACK.end - processor * STACK_PART;
    let mut bytes = vec![0; usize::from(TSS_SIZE)];
    bytes[4..12].copy_from_slice(&stack.to_le_bytes()); // stack of ring 0
    bytes[36..44].copy_from_slice(&stack.to_le_bytes()); // first interrupt stack
    bytes[102..104].copy_from_slice(&TSS_SIZE.to_le_bytes()); // where the I/O bitmap begins
    bytes.extend_from_slice(&io_bitmap());
    bytes
}

/// The content of [`TASKS`] for this number of workers, from its start on.
pub fn tasks(workers: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for worker in 1..=workers as u64 {
        let mut task = task_bytes(worker);
        task.resize(usize::try_from(TASK_ROOM).unwrap_or(0), 0);
        bytes.append(&mut task);
    }
    bytes
}

/// The supervisor's pages up to the stack, as they stand from [`SYSTEM_ADDR`] on.
pub fn bytes() -> Vec<u8> {
    let mut image = vec![0; 2 * 4096];
    let mut put = |address: u64, bytes: &[u8]| {
        let at = usize::try_from(address - SYSTEM_ADDR).unwrap_or(usize::MAX);
        if let Some(target) = image.get_mut(at..at + bytes.len()) {
            target.copy_from_slice(bytes);
        }
    };
    // Every segment is marked as accessed, and the task as busy: the processor never writes the table.
    let gdt = [
        0,
        0x0020_9b00_0000_0000, // code of ring 0
        0x00cf_9300_0000_ffff, // data of ring 0
        0x00cf_f300_0000_ffff, // data of ring 3
        0x0020_fb00_0000_0000, // code of ring 3
        u64::from(TSS_LIMIT) | (TSS & 0xff_ffff) << 16 | 0x8b << 40 | (TSS >> 24 & 0xff) << 56,
        TSS >> 32,
    ];
    for (address, entry) in (GDT..).step_by(8).zip(gdt) {
        put(address, &entry.to_le_bytes());
    }
    put(TSS, &task_bytes(0));
    for vector in 0..VECTORS {
        let stub = STUBS + u64::from(vector) * STUB_SIZE;
        put(IDT + u64::from(vector) * 16, &gate(stub));
        let [port_low, port_high] = PORT_FAULT.to_le_bytes();
        // mov dx, PORT_FAULT; mov al, vector; out dx, al; hlt
        put(stub, &[0x66, 0xba, port_low, port_high, 0xb0, vector, 0xee, 0xf4]);
    }
    image
}

/// A 0 bit for each port that ring 3 may use; all four bits of a 32-bit `out` must be 0.
fn io_bitmap() -> [u8; IO_BITMAP_SIZE as usize] {
    let mut bitmap = [0xff; IO_BITMAP_SIZE as usize];
    for port in PORTS.into_iter().flat_map(|port| port..port + 4) {
        if let Some(byte) = bitmap.get_mut(usize::from(port / 8)) {
            *byte &= !(1 << (port % 8));
        }
    }
    bitmap
}

/// An interrupt gate of ring 0 on the first interrupt stack.
fn gate(target: u64) -> [u8; 16] {
    let low = (target & 0xffff) | u64::from(KERNEL_CODE) << 16 | 1 << 32 | 0x8e << 40 | (target >> 16 & 0xffff) << 48;
    let mut gate = [0; 16];
    gate[..8].copy_from_slice(&low.to_le_bytes());
    gate[8..].copy_from_slice(&(target >> 32).to_le_bytes());
    gate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_do_not_overlap() {
        assert!(GDT + u64::from(GDT_LIMIT) < TSS);
        assert!(TSS + u64::from(TSS_LIMIT) < IDT);
        assert!(IDT + u64::from(IDT_LIMIT) < STUBS);
        assert_eq!(bytes().len() as u64, STUBS + PAGE_SIZE - SYSTEM_ADDR);
    }

    #[test]
    fn gates_lead_to_their_stubs() {
        let image = bytes();
        let gate = &image[usize::try_from(IDT - SYSTEM_ADDR).unwrap_or(0) + 14 * 16..][..16];
        let target = u64::from(gate[0]) | u64::from(gate[1]) << 8 | u64::from(gate[6]) << 16;
        let stub = &image[usize::try_from(target - SYSTEM_ADDR).unwrap_or(0)..][..8];
        assert_eq!(stub[5], 14);
    }
}
