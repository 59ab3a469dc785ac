//! Work that the other processors of the guest do while this one waits for the host.

use crate::crew::Crew;
#[cfg(feature = "guest")]
use crate::crew::Shared;
#[cfg(feature = "guest")]
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

/// Items that a [`Crew`] works on in the background: begun here, and done when they are asked for again.
///
/// The items own all that they read and write, so nothing else can see them half done. What [`Crew::for_each`] says of the work
/// holds here, too. One piece of work is in progress in the whole guest: another one that begins, of whatever driver, finishes it
/// first.
///
/// # Example
///
/// ```
/// use instar_guest_sdk::{Background, Crew};
///
/// let mut squares: Background<(), u64> = Background::new(Crew::new((), 7, || Some(())));
/// squares.begin(vec![1, 2, 3], |(), number| *number *= *number);
/// // Here, a driver writes what it has to the host.
/// assert_eq!(squares.end(), [1, 4, 9]);
/// ```
pub struct Background<S: Send + 'static, T: Send + 'static> {
    crew: Crew<S>,
    /// Nothing touches these and the states of the crew while work is `begun`.
    items: Vec<T>,
    begun: Option<Begun<S, T>>,
}

/// Work in progress.
#[cfg(feature = "guest")]
struct Begun<S, T> {
    number: u64,
    /// The processors read it: it stays where it is.
    _shared: Box<Shared<S, T>>,
}

/// Work in progress. Outside the guest, it is done when it is waited for.
#[cfg(not(feature = "guest"))]
struct Begun<S, T>(fn(&mut S, &mut T));

impl<S: Send + 'static, T: Send + 'static> Background<S, T> {
    /// Nothing is begun.
    #[must_use]
    pub const fn new(crew: Crew<S>) -> Self {
        Self { crew, items: Vec::new(), begun: None }
    }

    /// How many processors take part. On one, all is done when it is waited for.
    #[must_use]
    pub fn processors(&self) -> usize {
        self.crew.processors()
    }

    /// The state of this processor, when no work is in progress.
    pub fn own(&mut self) -> Option<&mut S> {
        self.wait();
        self.crew.own()
    }

    /// Begin with these items, after those of before are done, which are dropped.
    pub fn begin(&mut self, items: Vec<T>, work: fn(&mut S, &mut T)) {
        drop(self.end());
        self.items = items;
        self.begun = Some(self.start(work));
    }

    /// Do what is left, and return the items, all of them done, as they were given.
    #[must_use]
    pub fn end(&mut self) -> Vec<T> {
        self.wait();
        core::mem::take(&mut self.items)
    }

    #[cfg(feature = "guest")]
    fn start(&mut self, work: fn(&mut S, &mut T)) -> Begun<S, T> {
        let (slots, count) = (self.crew.states.len(), self.items.len());
        let shared = Box::new(Shared::new(&mut self.crew.states, &mut self.items, work));
        // SAFETY: `begun` keeps `shared`, and until `wait` neither the states nor the items are touched. They are on the heap, and
        // live for good: if this is forgotten, they stay there.
        let number = unsafe { Shared::begin(&raw const *shared, slots, count) };
        Begun { number, _shared: shared }
    }

    #[cfg(feature = "guest")]
    fn wait(&mut self) {
        if let Some(begun) = &self.begun {
            crate::runtime::parallel_end(begun.number);
        }
        self.begun = None;
    }

    #[cfg(not(feature = "guest"))]
    #[allow(clippy::unused_self, reason = "as in the guest")]
    fn start(&mut self, work: fn(&mut S, &mut T)) -> Begun<S, T> {
        Begun(work)
    }

    #[cfg(not(feature = "guest"))]
    fn wait(&mut self) {
        if let Some(Begun(work)) = self.begun.take() {
            self.crew.for_each(&mut self.items, work);
        }
    }
}

impl<S: Send + 'static, T: Send + 'static> fmt::Debug for Background<S, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background").field("is_begun", &self.begun.is_some()).finish_non_exhaustive()
    }
}

impl<S: Send + 'static, T: Send + 'static> Drop for Background<S, T> {
    fn drop(&mut self) {
        // The memory of the items goes away with this.
        self.wait();
    }
}
