//! Buffers for tests that send requests to a handler.

use crate::sandbox::{BufferAccess, VolatileSlice};

/// Ignores buffers: all written bytes are zeroes.
pub struct Zeroes;

impl BufferAccess for Zeroes {
    fn heap_slice(&self, _: u64, length: u64) -> Option<VolatileSlice<'_>> {
        let memory = vec![0_u8; usize::try_from(length).ok()?].leak();
        Some(VolatileSlice::from(memory))
    }
}
