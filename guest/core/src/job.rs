//! Work that several processors of the guest share: items, which each of them takes until none is left.

use core::ffi::c_void;
use core::mem::transmute;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use instar_guest_abi::ParallelWork;

/// The work of the moment. It is published while nobody takes part in the one before.
#[derive(Debug)]
pub struct Job {
    /// A [`ParallelWork`]; null before the first one.
    work: AtomicPtr<c_void>,
    context: AtomicPtr<c_void>,
    slots: AtomicUsize,
    count: AtomicUsize,
    /// The next item, and the next slot, that nobody has.
    next_item: AtomicUsize,
    next_slot: AtomicUsize,
    /// How many have taken part, and are done.
    left: AtomicUsize,
}

impl Job {
    /// Nothing to do.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            work: AtomicPtr::new(null_mut()),
            context: AtomicPtr::new(null_mut()),
            slots: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            next_item: AtomicUsize::new(0),
            next_slot: AtomicUsize::new(0),
            left: AtomicUsize::new(0),
        }
    }

    /// Publish work on `count` items for up to `slots` processors. Slot 0 belongs to the processor that publishes.
    pub fn publish(&self, work: ParallelWork, context: *const c_void, slots: usize, count: usize) {
        self.work.store(work as *mut c_void, Ordering::Relaxed);
        self.context.store(context.cast_mut(), Ordering::Relaxed);
        self.slots.store(slots, Ordering::Relaxed);
        self.count.store(count, Ordering::Relaxed);
        self.next_item.store(0, Ordering::Relaxed);
        // A processor that gets a slot sees all that was written before.
        self.next_slot.store(1, Ordering::Release);
    }

    /// Take items until none is left, as the one who has published them.
    pub fn lead(&self) {
        self.work(0);
    }

    /// Take items until none is left, as another processor. One that comes when all slots are taken takes none.
    pub fn help(&self) {
        self.work(self.next_slot.fetch_add(1, Ordering::AcqRel));
    }

    fn work(&self, slot: usize) {
        let work = self.work.load(Ordering::Relaxed);
        if slot < self.slots.load(Ordering::Relaxed) && !work.is_null() {
            // SAFETY: `publish` stored a function of this type, and nothing else is ever stored there.
            let work = unsafe { transmute::<*mut c_void, ParallelWork>(work) };
            let (context, count) = (self.context.load(Ordering::Relaxed), self.count.load(Ordering::Relaxed));
            loop {
                let item = self.next_item.fetch_add(1, Ordering::Relaxed);
                if item >= count {
                    break;
                }
                work(context, slot, item);
            }
        }
        self.left.fetch_add(1, Ordering::Release);
    }

    /// See what the processors that took part have written. The caller, who woke them, knows whether all are done.
    pub fn see(&self) {
        let _ = self.left.load(Ordering::Acquire);
    }
}

impl Default for Job {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    struct Work {
        done: Vec<AtomicUsize>,
        in_slot: Vec<AtomicUsize>,
    }

    extern "C" fn work(context: *const c_void, slot: usize, item: usize) {
        // SAFETY: the tests pass one that outlives the work.
        let context = unsafe { &*context.cast::<Work>() };
        assert_eq!(context.in_slot[slot].swap(1, Ordering::SeqCst), 0, "two at a time in slot {slot}");
        context.done[item].fetch_add(1, Ordering::SeqCst);
        context.in_slot[slot].store(0, Ordering::SeqCst);
    }

    fn zeroes(count: usize) -> Vec<AtomicUsize> {
        (0..count).map(|_| AtomicUsize::new(0)).collect()
    }

    #[test]
    fn each_item_is_done_once_and_each_slot_is_one_processors() {
        let job = Job::new();
        job.help();
        for (processors, slots, count) in [(1, 1, 9), (4, 4, 1000), (4, 2, 1000), (3, 8, 2), (4, 4, 0)] {
            let context = Work { done: zeroes(count), in_slot: zeroes(slots) };
            job.publish(work, (&raw const context).cast(), slots, count);
            std::thread::scope(|scope| {
                for _ in 1..processors {
                    scope.spawn(|| job.help());
                }
                job.lead();
            });
            job.see();
            assert!(context.done.iter().all(|done| done.load(Ordering::SeqCst) == 1), "{processors}, {slots}, {count}");
        }
    }
}
