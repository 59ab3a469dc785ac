//! The `instar` command.

#![deny(clippy::print_stdout, clippy::print_stderr)]

use instar::confine::descriptors::close_inherited;
use instar::confine::trap::end_without_memory;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: nothing was opened before.
    unsafe { close_inherited(std::env::args_os()) };
    let arguments: Vec<OsString> = std::env::args_os().collect();
    ExitCode::from(instar_cli::main(&arguments, &mut std::io::stdout().lock()))
}

/// The system's allocator, with one line where it has nothing more: the runtime's own message asks for more memory, and for
/// files that a confined process cannot open.
struct Memory;

#[global_allocator]
static MEMORY: Memory = Memory;

fn there(pointer: *mut u8, bytes: usize) -> *mut u8 {
    if pointer.is_null() {
        end_without_memory(bytes);
    }
    pointer
}

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Memory {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is ours.
        there(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is ours.
        there(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is ours.
        unsafe { System.dealloc(pointer, layout) };
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's contract is ours.
        there(unsafe { System.realloc(pointer, layout, size) }, size)
    }
}
