//! The services that core offers to every other module of the guest.

use crate::Request;
use core::ffi::c_void;
use core::mem::offset_of;

/// Function table that core passes to each module's entry. It grows only at the end; `size` tells how much
/// of it is there.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CallTable {
    /// `size_of::<CallTable>()` of the core that made it.
    pub size: u32,
    /// [`MODULE_ABI_MAJOR`](crate::MODULE_ABI_MAJOR) of core.
    pub abi_major: u32,
    /// [`MODULE_ABI_MINOR`](crate::MODULE_ABI_MINOR) of core.
    pub abi_minor: u32,
    /// Zero.
    pub reserved: u32,
    /// Allocate `size` bytes aligned to `align`; null when the heap is exhausted.
    pub alloc: extern "C" fn(size: usize, align: usize) -> *mut u8,
    /// Give back what `alloc` returned for the same `size` and `align`.
    pub dealloc: extern "C" fn(ptr: *mut u8, size: usize, align: usize),
    /// Execute `count` requests in order, any number of them. Each request's `status` is set as in
    /// [`Request`]. Returns the index of the first request that failed, or `count`.
    pub submit: extern "C" fn(requests: *mut Request, count: usize) -> usize,
    /// Send one encoded `GuestMessage`, at most [`MESSAGE_SIZE`](crate::MESSAGE_SIZE) bytes.
    pub message: extern "C" fn(bytes: *const u8, length: usize),
    /// Bytes of heap that are free now.
    pub heap_free: extern "C" fn() -> usize,
    /// Report a panic with this UTF-8 text and end the guest.
    pub panic: extern "C" fn(text: *const u8, length: usize) -> !,
    /// How many processors the guest has, this one included.
    pub processors: extern "C" fn() -> usize,
    /// Begin to call `work` once for each of `count` items, on up to `slots` processors, and return the number of this work. The
    /// workers do items from now on, this processor when it waits for their end. The order is any; no two calls at the same time
    /// have the same slot, and each slot is below `slots`. The calls use no other callback. Work that was begun before ends
    /// first.
    pub parallel_begin: extern "C" fn(work: ParallelWork, context: *const c_void, slots: usize, count: usize) -> u64,
    /// Return when all items of the work with this number are done, and do what is left of them.
    pub parallel_end: extern "C" fn(number: u64),
}

/// What core calls for an item of shared work: the context that it was given, the slot, and the number of the item.
pub type ParallelWork = extern "C" fn(context: *const c_void, slot: usize, item: usize);

impl CallTable {
    /// Size in bytes of the table of minor version 0, up to its last function: whatever is appended leaves this as it is. An
    /// older core lacks it, so a module looks at `size` before it calls such a function, and does without if it can.
    pub const MIN_SIZE: usize = offset_of!(Self, parallel_end) + size_of::<usize>();
}
