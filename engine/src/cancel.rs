//! How an operation is ended from outside.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

/// Ends an operation from another thread, or from a signal handler: between two requests, where the files are consistent.
/// Clones end the same operation.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// One that was not asked for yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// End the operation. A signal handler may call it: it neither allocates nor waits.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the operation is to end.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
