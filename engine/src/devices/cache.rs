//! The cache modes of `-t`.

/// What a flush, and a write, promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// After a flush, everything before it is durable.
    #[default]
    Writeback,
    /// Everything is durable before the guest is told that it is done.
    Writethrough,
    /// Nothing is promised: for images that can be thrown away.
    Unsafe,
    /// As writeback, past the page cache.
    None,
    /// As writethrough, past the page cache.
    Directsync,
}

impl Cache {
    /// Whether every write is followed by a flush.
    pub(super) fn flushes_writes(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// Whether the page cache is passed by.
    pub(super) fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }
}
