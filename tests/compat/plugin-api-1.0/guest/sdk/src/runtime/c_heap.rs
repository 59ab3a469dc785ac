//! `malloc` and its kin, for drivers that link a decoder that is written in C: from core's heap, like everything else.
//!
//! C does not tell the size of a block that it frees, so a header before each block holds it.

use alloc::alloc::{alloc, alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ffi::c_void;
use core::ptr::null_mut;

/// Bytes before a block, and its alignment: what C promises for every type.
const HEADER: usize = 16;

/// The layout of a block of `size` bytes with its header.
fn layout(size: usize) -> Option<Layout> {
    Layout::from_size_align(size.checked_add(HEADER)?, HEADER).ok()
}

/// # Safety
/// `block` is null, or memory of `layout(size)`.
unsafe fn with_header(block: *mut u8, size: usize) -> *mut c_void {
    if block.is_null() {
        return null_mut();
    }
    // SAFETY: the header is part of the block, which is aligned for it.
    unsafe {
        block.cast::<usize>().write(size);
        block.add(HEADER).cast()
    }
}

/// C's `malloc`.
#[no_mangle]
extern "C" fn malloc(size: usize) -> *mut c_void {
    let Some(layout) = layout(size) else { return null_mut() };
    // SAFETY: the layout has a size, that of the header at least.
    unsafe { with_header(alloc(layout), size) }
}

/// C's `calloc`.
#[no_mangle]
extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    let Some(size) = count.checked_mul(size) else { return null_mut() };
    let Some(layout) = layout(size) else { return null_mut() };
    // SAFETY: as in `malloc`.
    unsafe { with_header(alloc_zeroed(layout), size) }
}

/// C's `free`.
///
/// # Safety
/// `pointer` is null or a block of [`malloc`] or [`calloc`] that was not freed.
#[no_mangle]
unsafe extern "C" fn free(pointer: *mut c_void) {
    if pointer.is_null() {
        return;
    }
    // SAFETY: before every block stands its header, with its size.
    unsafe {
        let block = pointer.cast::<u8>().sub(HEADER);
        if let Some(layout) = layout(block.cast::<usize>().read()) {
            dealloc(block, layout);
        }
    }
}
