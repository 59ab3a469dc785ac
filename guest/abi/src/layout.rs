//! Where things are in guest memory, and the I/O ports of the guest.
//!
//! The host builds the page tables from this map; the guest only ever sees the addresses. Sizes and
//! addresses are bytes.

/// Size of guest memory in bytes, whatever the size of the images.
pub const GUEST_MEMORY_SIZE: u64 = 64 << 20;

/// Size of a small guest page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Descriptor tables, ring-0 fault stubs and their stack: supervisor only, not reachable from ring 3.
pub const SYSTEM_ADDR: u64 = 0x1000;
/// Size of the supervisor area in bytes.
pub const SYSTEM_SIZE: u64 = 0x7000;

/// Page tables, written by the host and never mapped in the guest's own address space.
pub const PAGE_TABLES_ADDR: u64 = 0x8000;
/// Size of the page-table area in bytes.
pub const PAGE_TABLES_SIZE: u64 = 0x3_8000;

/// [`OperationConfig`](crate::OperationConfig), read-only to the guest.
pub const OPERATION_CONFIG_ADDR: u64 = 0x4_0000;
/// [`ChainConfig`](crate::ChainConfig), read-only to the guest.
pub const CHAIN_CONFIG_ADDR: u64 = 0x4_1000;
/// The operation's own configuration, an encoded message, read-only to the guest.
pub const PAYLOAD_ADDR: u64 = 0x4_2000;
/// Bytes reserved for it.
pub const PAYLOAD_SIZE: u64 = 0x1000;
/// [`ModuleTable`](crate::ModuleTable), read-only to the guest.
pub const MODULE_TABLE_ADDR: u64 = 0x4_3000;
/// The [`FileDevice`](crate::FileDevice)s of all images, read-only to the guest.
pub const FILE_TABLE_ADDR: u64 = 0x4_4000;
/// The [`Member`](crate::Member)s, read-only to the guest.
pub const MEMBER_TABLE_ADDR: u64 = 0x4_7000;
/// End of the read-only configuration area.
pub const CONFIG_END: u64 = 0x5_3000;

/// The request [`Ring`](crate::Ring), read-write.
pub const RING_ADDR: u64 = 0x5_7000;
/// Bytes reserved for the ring.
pub const RING_SIZE: u64 = 0x8000;

/// Buffer for one encoded `GuestMessage`, read-write.
pub const MESSAGE_ADDR: u64 = 0x6_0000;
/// Size of the message buffer in bytes: no message may be longer.
pub const MESSAGE_SIZE: u64 = 0x4000;

/// Top of the guest stack (it grows down); the page below the stack is unmapped.
pub const STACK_TOP: u64 = 0x10_0000;
/// Size of the guest stack in bytes.
pub const STACK_SIZE: u64 = 0x8_0000;

/// How many processors the guest may have besides the main one.
pub const MAX_WORKERS: usize = 7;
/// The workers' stacks: each has [`WORKER_STACK_SIZE`] bytes of this range, of which the lowest page is unmapped. The heap ends
/// here, however many workers there are.
pub const WORKER_STACKS_ADDR: u64 = GUEST_MEMORY_SIZE - (MAX_WORKERS as u64 + 1) * WORKER_STACK_SIZE;
/// Size of a worker's stack in bytes, with the page below it.
pub const WORKER_STACK_SIZE: u64 = 0x4_0000;

/// Top of the stack of a worker; they count from 1.
#[must_use]
pub const fn worker_stack_top(worker: u64) -> u64 {
    WORKER_STACKS_ADDR + (worker + 1) * WORKER_STACK_SIZE
}

/// First address at which the host loads modules. The heap begins at the page after the last module and reaches to
/// [`WORKER_STACKS_ADDR`]; [`OperationConfig`](crate::OperationConfig) names it.
pub const MODULES_ADDR: u64 = 0x10_0000;

/// `out` of the number of requests in the ring: the host executes them, in order, before it returns.
pub const PORT_DOORBELL: u16 = 0x510;
/// `out` of the length in bytes of the message at [`MESSAGE_ADDR`].
pub const PORT_MESSAGE: u16 = 0x511;
/// `out` of a fault vector number, done by the ring-0 stubs only.
pub const PORT_FAULT: u16 = 0x512;
/// `out` of anything: the guest is finished.
pub const PORT_EXIT: u16 = 0x513;
/// `out` of a number of workers: the host lets as many as that enter core, each with its number in `rdi`, or go on behind
/// their last `out`. No more than [`OperationConfig::workers`](crate::OperationConfig::workers), and none of them may be at work.
pub const PORT_WAKE: u16 = 0x514;
/// `out` of anything: the host answers when no worker is at work. One that has not begun yet does not begin.
pub const PORT_JOIN: u16 = 0x515;
/// `out` of anything by a worker, the only one that it may do: it sleeps until it is woken again.
pub const PORT_IDLE: u16 = 0x516;
