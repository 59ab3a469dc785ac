//! Ending an operation from outside.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// A handle that ends an operation from another thread or a signal handler, between two requests, where the files are
/// consistent. Clones end the same operation.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Make a handle that has not been used yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// End the operation. A signal handler may call it: it neither allocates nor waits.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether somebody has ended the operation.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
