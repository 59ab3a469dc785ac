//! Cache modes, as `qemu-img` names them.

/// How much the operating system may keep in memory, and when it has to be durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum CacheMode {
    /// Around the page cache; flushes are honoured.
    None,
    /// Through the page cache; flushes are honoured.
    #[default]
    Writeback,
    /// Through the page cache; every write is durable when it is done.
    Writethrough,
    /// Around the page cache; every write is durable when it is done.
    Directsync,
    /// Through the page cache; flushes are ignored. A crash can destroy the images.
    Unsafe,
}

impl CacheMode {
    /// The name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
            Self::Directsync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }

    /// Whether a flush reaches the disk.
    #[must_use]
    pub const fn honours_flush(self) -> bool {
        !matches!(self, Self::Unsafe)
    }
}
