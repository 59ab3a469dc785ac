//! `malloc` and its kin, for drivers that link a decoder which allocates as C does: from core's heap, like everything else.
//!
//! C does not tell the size of a block that it frees, so a header before each block holds it.

use alloc::alloc::{alloc, alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ffi::{c_int, c_void};
use core::ptr::null_mut;

/// The least alignment of a block: what C promises for every type.
const ALIGN: usize = 16;
const ENOMEM: c_int = 12;
const EINVAL: c_int = 22;

/// What stands right before a block, in the room in front of it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Header {
    /// Bytes of the block.
    size: usize,
    /// Bytes of the room, and the alignment of both.
    align: usize,
}

/// The layout of a block of `size` bytes with the room in front of it, which is as long as the block is aligned.
fn layout(size: usize, align: usize) -> Option<Layout> {
    Layout::from_size_align(size.checked_add(align)?, align).ok()
}

/// A block, or null. `align` is a power of two, and no less than [`ALIGN`].
fn allocate(size: usize, align: usize, allocator: unsafe fn(Layout) -> *mut u8) -> *mut c_void {
    let Some(layout) = layout(size, align) else { return null_mut() };
    // SAFETY: the layout has a size, that of the room at least.
    let room = unsafe { allocator(layout) };
    if room.is_null() {
        return null_mut();
    }
    // SAFETY: the room is as long as a header at least, and aligned for it at both ends.
    unsafe {
        let block = room.add(align);
        block.cast::<Header>().sub(1).write(Header { size, align });
        block.cast()
    }
}

/// C's `malloc`.
#[no_mangle]
extern "C" fn malloc(size: usize) -> *mut c_void {
    allocate(size, ALIGN, alloc)
}

/// C's `calloc`.
#[no_mangle]
extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    count.checked_mul(size).map_or(null_mut(), |size| allocate(size, ALIGN, alloc_zeroed))
}

/// C's `posix_memalign`.
///
/// # Safety
/// `place` may be written to.
#[no_mangle]
unsafe extern "C" fn posix_memalign(place: *mut *mut c_void, align: usize, size: usize) -> c_int {
    if !align.is_power_of_two() {
        return EINVAL;
    }
    let block = allocate(size, align.max(ALIGN), alloc);
    if block.is_null() {
        return ENOMEM;
    }
    // SAFETY: the caller promises that.
    unsafe { place.write(block) };
    0
}

/// C's `free`.
///
/// # Safety
/// `pointer` is null or a block of one of the functions above that was not freed.
#[no_mangle]
unsafe extern "C" fn free(pointer: *mut c_void) {
    if pointer.is_null() {
        return;
    }
    // SAFETY: before every block stands its header, at the end of its room.
    unsafe {
        let Header { size, align } = pointer.cast::<Header>().sub(1).read();
        if let Some(layout) = layout(size, align) {
            dealloc(pointer.cast::<u8>().sub(align), layout);
        }
    }
}
