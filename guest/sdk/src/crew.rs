//! Work on bytes in memory that all processors of the guest share.

use alloc::vec;
use alloc::vec::Vec;
#[cfg(feature = "guest")]
use core::ffi::c_void;

/// A state for each processor that takes part in shared work: a decoder, say, with the memory that it needs.
///
/// Most of what a driver does waits for the host or for what it has just read. Decoding, encoding and comparing bytes that are
/// there already is what several processors do in less time.
///
/// # Example
///
/// Count the zeroes of blocks, each with a table of its own:
///
/// ```
/// use instar_guest_sdk::Crew;
///
/// struct Block<'a> {
///     bytes: &'a [u8],
///     zeroes: u32,
/// }
///
/// let bytes = vec![0; 1000];
/// let mut blocks: Vec<Block<'_>> = bytes.chunks(100).map(|bytes| Block { bytes, zeroes: 0 }).collect();
/// let mut crew = Crew::new([0u32; 256], 3, || Some([0; 256]));
/// crew.for_each(&mut blocks, |counts, block| {
///     counts.fill(0);
///     block.bytes.iter().for_each(|&byte| counts[usize::from(byte)] += 1);
///     block.zeroes = counts[0];
/// });
/// assert_eq!(blocks.iter().map(|block| block.zeroes).sum::<u32>(), 1000);
/// ```
#[derive(Debug)]
pub struct Crew<S> {
    /// At least one.
    pub(crate) states: Vec<S>,
}

impl<S: Send> Crew<S> {
    /// The state of this processor, and one for each further, `most` of them at most, as far as there is memory for `another`.
    pub fn new(own: S, most: usize, mut another: impl FnMut() -> Option<S>) -> Self {
        let mut states = vec![own];
        let others = processors().saturating_sub(1).min(most);
        states.extend((0..others).map_while(|_| another()));
        Self { states }
    }

    /// How many processors take part; how many that are must not show in any result.
    #[must_use]
    pub fn processors(&self) -> usize {
        self.states.len()
    }

    /// The state of this processor.
    pub fn own(&mut self) -> Option<&mut S> {
        self.states.first_mut()
    }

    /// Do `work` on each item, with the state of whichever processor takes it, in any order; returns when all are done.
    ///
    /// An item is all that `work` may write to, with the state that it is given: so the order never shows. What lies in an item
    /// was allocated before. While it works, it must not allocate or free memory, ask for a device, send a message or share work
    /// itself: with several processors, core ends a guest that does. It is a function and no closure, so that it brings nothing
    /// along that another one has, too.
    pub fn for_each<T: Send>(&mut self, items: &mut [T], work: fn(&mut S, &mut T)) {
        #[cfg(feature = "guest")]
        if self.states.len() > 1 && items.len() > 1 {
            return shared(&mut self.states, items, work);
        }
        #[cfg(feature = "guest")]
        let items = items.iter_mut();
        // In another order, where a driver is tested.
        #[cfg(not(feature = "guest"))]
        let items = items.iter_mut().rev();
        for (turn, item) in items.enumerate() {
            let count = self.states.len();
            if let Some(state) = self.states.get_mut(turn % count.max(1)) {
                work(state, item);
            }
        }
    }
}

/// How many processors there are. Outside the guest, where drivers are tested, there are several states, and one thread.
fn processors() -> usize {
    #[cfg(feature = "guest")]
    return crate::runtime::processors();
    #[cfg(not(feature = "guest"))]
    3
}

/// What the processors are told.
#[cfg(feature = "guest")]
pub(crate) struct Shared<S, T> {
    states: *mut S,
    items: *mut T,
    work: fn(&mut S, &mut T),
}

#[cfg(feature = "guest")]
impl<S: Send, T: Send> Shared<S, T> {
    /// Work on these items, with these states.
    pub(crate) fn new(states: &mut [S], items: &mut [T], work: fn(&mut S, &mut T)) -> Self {
        Self { states: states.as_mut_ptr(), items: items.as_mut_ptr(), work }
    }

    /// Begin it, and return its number.
    ///
    /// # Safety
    /// Until [`parallel_end`](crate::runtime::parallel_end) returns for this number, `shared` stays where it is, there are as many
    /// states and items as it was made of, and nothing else refers to them.
    pub(crate) unsafe fn begin(shared: *const Self, states: usize, items: usize) -> u64 {
        crate::runtime::parallel_begin(one::<S, T>, shared.cast(), states, items)
    }
}

#[cfg(feature = "guest")]
fn shared<S: Send, T: Send>(states: &mut [S], items: &mut [T], work: fn(&mut S, &mut T)) {
    let (slots, count) = (states.len(), items.len());
    let shared = Shared::new(states, items, work);
    // SAFETY: `shared` and both slices outlive the next line, and nothing uses them meanwhile.
    let number = unsafe { Shared::begin(&raw const shared, slots, count) };
    crate::runtime::parallel_end(number);
}

/// Do one item.
#[cfg(feature = "guest")]
extern "C" fn one<S: Send, T: Send>(context: *const c_void, slot: usize, item: usize) {
    // SAFETY: core calls this until `parallel_end` returns, with slots and items below the numbers that it was given, each item
    // once and no slot twice at a time: as `Shared::begin` demands, these are the only references to both.
    unsafe {
        let shared = &*context.cast::<Shared<S, T>>();
        (shared.work)(&mut *shared.states.add(slot), &mut *shared.items.add(item));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_always_one_who_works() {
        let mut crew = Crew::new(5, 0, || None);
        let mut items = [1, 2, 3];
        crew.for_each(&mut items, |state, item| *item *= *state);
        assert_eq!((items, crew.processors(), crew.own().copied()), ([5, 10, 15], 1, Some(5)));
    }
}
