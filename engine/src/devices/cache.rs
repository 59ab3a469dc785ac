//! The cache modes of `-t`.

/// The durability that a flush and a write promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// After a flush, everything before it is durable.
    #[default]
    Writeback,
    /// Every change is durable before the guest learns that it is done.
    Writethrough,
    /// No promise, for images that can be thrown away.
    Unsafe,
    /// As writeback, bypassing the page cache.
    None,
    /// As writethrough, bypassing the page cache.
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
