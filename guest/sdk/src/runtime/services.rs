//! Core's services, reached through the call table.

use crate::{BlockIo, IoFailure};
use core::alloc::{GlobalAlloc, Layout};
use core::ffi::c_void;
use core::fmt::{self, Write};
use core::ptr::null;
use core::sync::atomic::{AtomicPtr, Ordering};
use instar_guest_abi::{CallTable, ParallelWork, Phase, Request, MODULE_ABI_MAJOR};

static TABLE: AtomicPtr<CallTable> = AtomicPtr::new(null::<CallTable>().cast_mut());

/// Store core's call table. Returns `false` if this module cannot work with it.
///
/// # Safety
/// `table` is null or points to a call table that lives as long as the guest.
pub unsafe fn init(table: *const CallTable) -> bool {
    if table.is_null() {
        return false;
    }
    // SAFETY: not null, so it points to a call table; `size` and `abi_major` stand first in every version.
    let (size, major) = unsafe { ((*table).size, (*table).abi_major) };
    if (size as usize) < CallTable::MIN_SIZE || major != MODULE_ABI_MAJOR {
        return false;
    }
    TABLE.store(table.cast_mut(), Ordering::Relaxed);
    true
}

fn table() -> Option<&'static CallTable> {
    // SAFETY: `init` stored null or a table that lives as long as the guest.
    unsafe { TABLE.load(Ordering::Relaxed).as_ref() }
}

/// Send one encoded `GuestMessage`.
pub fn send(message: &[u8]) {
    if let Some(table) = table() {
        (table.message)(message.as_ptr(), message.len());
    }
}

/// Return the bytes of heap that are free now.
#[must_use]
pub fn heap_free() -> usize {
    table().map_or(0, |table| (table.heap_free)())
}

/// How many processors there are.
pub(crate) fn processors() -> usize {
    table().map_or(1, |table| (table.processors)())
}

/// Begin to have `work` called for each of `count` items by up to `slots` processors; returns the number of this work.
pub(crate) fn parallel_begin(work: ParallelWork, context: *const c_void, slots: usize, count: usize) -> u64 {
    table().map_or(0, |table| (table.parallel_begin)(work, context, slots, count))
}

/// Wait until all items of the work with this number are done, and help.
pub(crate) fn parallel_end(number: u64) {
    if let Some(table) = table() {
        (table.parallel_end)(number);
    }
}

/// Block I/O through core's ring.
#[derive(Clone, Copy, Debug, Default)]
pub struct GuestIo;

impl BlockIo for GuestIo {
    fn submit(&mut self, requests: &mut [Request]) -> Result<(), IoFailure> {
        const EIO: u32 = 5;
        if requests.is_empty() {
            return Ok(());
        }
        let Some(table) = table() else { return Err(IoFailure { index: 0, errno: EIO }) };
        let index = (table.submit)(requests.as_mut_ptr(), requests.len());
        match requests.get(index) {
            None => Ok(()),
            Some(failed) => Err(IoFailure { index, errno: u32::try_from(failed.status).unwrap_or(EIO) }),
        }
    }

    fn heap_free(&self) -> usize {
        heap_free()
    }

    fn enter(&mut self, phase: Phase) {
        send(&crate::message::phase(phase));
    }
}

struct Heap;

#[cfg(not(test))]
#[global_allocator]
static HEAP: Heap = Heap;

// SAFETY: core's heap returns null or memory that is exclusive to the caller and fits the layout.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        table().map_or(core::ptr::null_mut(), |table| (table.alloc)(layout.size(), layout.align()))
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if let Some(table) = table() {
            (table.dealloc)(pointer, layout.size(), layout.align());
        }
    }
}

/// Text of bounded length, so that a panic needs no heap.
struct Text {
    bytes: [u8; 1024],
    length: usize,
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.len() - self.length;
        let mut count = text.len().min(room);
        while !text.is_char_boundary(count) {
            count -= 1;
        }
        if let (Some(to), Some(from)) =
            (self.bytes.get_mut(self.length..self.length + count), text.as_bytes().get(..count))
        {
            to.copy_from_slice(from);
            self.length += count;
        }
        Ok(())
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let mut text = Text { bytes: [0; 1024], length: 0 };
    // Writing into `Text` cannot fail.
    let _ = write!(text, "{}", info.message());
    if let Some(place) = info.location() {
        let _ = write!(text, " ({}:{})", place.file(), place.line());
    }
    if let Some(table) = table() {
        (table.panic)(text.bytes.as_ptr(), text.length);
    }
    // Before `init` there is nobody to tell: an invalid instruction is reported by the host.
    loop {
        // SAFETY: raises the invalid-opcode fault, which ends the guest.
        unsafe { core::arch::asm!("ud2") };
    }
}

/// Referenced by the precompiled `core` and `alloc`; never called, as modules are built with `panic=abort`.
#[cfg(not(test))]
#[no_mangle]
extern "C" fn rust_eh_personality() {}

/// As [`rust_eh_personality`].
#[cfg(not(test))]
#[no_mangle]
extern "C" fn _Unwind_Resume() {}
