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

/// First address at which the host loads modules. The heap begins at the next 2 MiB boundary after the
/// last module and reaches to [`GUEST_MEMORY_SIZE`]; [`OperationConfig`](crate::OperationConfig) names it.
pub const MODULES_ADDR: u64 = 0x10_0000;

/// `out` of the number of requests in the ring: the host executes them, in order, before it returns.
pub const PORT_DOORBELL: u16 = 0x510;
/// `out` of the length in bytes of the message at [`MESSAGE_ADDR`].
pub const PORT_MESSAGE: u16 = 0x511;
/// `out` of a fault vector number, done by the ring-0 stubs only.
pub const PORT_FAULT: u16 = 0x512;
/// `out` of anything: the guest is finished.
pub const PORT_EXIT: u16 = 0x513;
