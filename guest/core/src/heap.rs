//! The heap of the guest, shared by all modules.

use core::alloc::Layout;
use core::ptr::{null_mut, NonNull};
use talc::{ErrOnOom, Span, Talc};

/// A heap over one range of memory. It prefers low addresses, so that only what is used is touched: the first touch of
/// a guest page is what costs.
pub struct Heap {
    talc: Talc<ErrOnOom>,
    free: usize,
}

/// What an allocation of `size` bytes takes from the heap: its tag too, in whole words, and never less than four.
const fn cost(size: usize) -> usize {
    const WORD: usize = size_of::<usize>();
    let words = size.saturating_add(WORD).div_ceil(WORD);
    (if words < 4 { 4 } else { words }).saturating_mul(WORD)
}

impl Heap {
    /// A heap without memory.
    #[must_use]
    pub const fn new() -> Self {
        Self { talc: Talc::new(ErrOnOom), free: 0 }
    }

    /// Give the heap its memory. `false` if it is too small to be of use.
    ///
    /// # Safety
    /// `start..end` is writable memory that nothing else uses for as long as the heap is used.
    pub unsafe fn claim(&mut self, start: usize, end: usize) -> bool {
        if end <= start {
            return false;
        }
        // SAFETY: the caller promises that the range is ours.
        match unsafe { self.talc.claim(Span::new(start as *mut u8, end as *mut u8)) } {
            Ok(span) => {
                self.free += span.size();
                true
            }
            Err(()) => false,
        }
    }

    /// Allocate; null when there is no room or the layout is impossible.
    pub fn alloc(&mut self, size: usize, align: usize) -> *mut u8 {
        let Ok(layout) = Layout::from_size_align(size.max(1), align) else { return null_mut() };
        // SAFETY: the layout's size is not zero.
        match unsafe { self.talc.malloc(layout) } {
            Ok(pointer) => {
                self.free = self.free.saturating_sub(cost(size));
                pointer.as_ptr()
            }
            Err(()) => null_mut(),
        }
    }

    /// Give back an allocation.
    ///
    /// # Safety
    /// `pointer` is null or came from [`Heap::alloc`] with the same `size` and `align`, and is not used any more.
    pub unsafe fn dealloc(&mut self, pointer: *mut u8, size: usize, align: usize) {
        let (Some(pointer), Ok(layout)) = (NonNull::new(pointer), Layout::from_size_align(size.max(1), align)) else {
            return;
        };
        // SAFETY: the caller promises that it is one of ours.
        unsafe { self.talc.free(pointer, layout) };
        self.free += cost(size);
    }

    /// Bytes that are free, not in one piece.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free
    }
}

impl Default for Heap {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    fn heap(size: usize) -> (Vec<u64>, Heap) {
        let mut memory = std::vec![0_u64; size / 8];
        let start = memory.as_mut_ptr() as usize;
        let mut heap = Heap::new();
        // SAFETY: the vector outlives the heap in every test.
        assert!(unsafe { heap.claim(start, start + size) });
        (memory, heap)
    }

    #[test]
    fn low_addresses_come_first() {
        let (memory, mut heap) = heap(4 << 20);
        let start = memory.as_ptr() as usize;
        let mut blocks: Vec<*mut u8> = (0..64).map(|_| heap.alloc(4096, 8)).collect();
        for round in 0..10_000_usize {
            let index = round * 7 % blocks.len();
            // SAFETY: allocated above with this layout.
            unsafe { heap.dealloc(blocks[index], 4096, 8) };
            blocks[index] = heap.alloc(4096, 8);
            let offset = blocks[index] as usize - start;
            assert!(offset < 80 * 4200, "block at offset {offset} of a heap with 64 blocks");
        }
    }

    #[test]
    fn free_bytes_are_counted() {
        let (_memory, mut heap) = heap(1 << 20);
        let before = heap.free();
        assert!(before > (1 << 20) - 4096);
        let block = heap.alloc(100_000, 16);
        assert!(heap.free() <= before - 100_000);
        // SAFETY: allocated above with this layout.
        unsafe { heap.dealloc(block, 100_000, 16) };
        assert_eq!(heap.free(), before);
    }

    #[test]
    fn exhaustion_and_nonsense_are_null() {
        let (_memory, mut heap) = heap(1 << 16);
        assert!(heap.alloc(1 << 20, 8).is_null());
        assert!(heap.alloc(8, 3).is_null());
        assert!(heap.alloc(usize::MAX, 8).is_null());
        let mut count = 0;
        while !heap.alloc(4096, 8).is_null() {
            count += 1;
        }
        assert!((14..=16).contains(&count), "{count} pages of 64 KiB");
        // SAFETY: null is allowed.
        unsafe { heap.dealloc(null_mut(), 8, 8) };
    }

    #[test]
    fn alignment_is_kept() {
        let (_memory, mut heap) = heap(1 << 20);
        for align in [1, 2, 8, 64, 4096, 65536] {
            let block = heap.alloc(10, align);
            assert_eq!(block as usize % align, 0);
            assert!(!block.is_null());
        }
    }

    #[test]
    fn an_empty_range_is_refused() {
        // SAFETY: nothing is claimed.
        assert!(!unsafe { Heap::new().claim(4096, 4096) });
    }
}
