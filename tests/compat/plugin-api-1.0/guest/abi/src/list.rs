//! A list in guest memory: an address and a count.

use core::marker::PhantomData;

/// A list of `T`s that lives as long as the guest and does not change. The default is an empty one.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct List<T> {
    address: u64,
    count: u64,
    items: PhantomData<T>,
}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self { address: 0, count: 0, items: PhantomData }
    }
}

impl<T: 'static> List<T> {
    /// The items of a slice that is never freed.
    #[must_use]
    pub fn of(items: &'static [T]) -> Self {
        Self { address: items.as_ptr() as u64, count: items.len() as u64, items: PhantomData }
    }

    /// The `count` items that stand at `address` of the memory in which the list is looked at.
    ///
    /// # Safety
    /// They stand there, and do not change, as long as anything looks at the list.
    #[must_use]
    pub const unsafe fn at(address: u64, count: u64) -> Self {
        Self { address, count, items: PhantomData }
    }

    /// How many items the list says it has.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "built for 64 bits only")]
    pub const fn count(&self) -> usize {
        self.count as usize
    }

    /// The items.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "built for 64 bits only")]
    pub fn as_slice(&self) -> &'static [T] {
        if self.count == 0 {
            return &[];
        }
        // SAFETY: the two ways to make a list that is not empty promise it.
        unsafe { core::slice::from_raw_parts(self.address as *const T, self.count as usize) }
    }
}
