//! The cache modes of commands that write images.

use clap::ValueEnum;
use instar::devices::Cache;

/// Cache modes, with qemu-img's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// Like writeback, but bypass the page cache
    None,
    /// Use the page cache, and flush between steps so that a crash loses nothing (default)
    #[default]
    Writeback,
    /// Like writeback, and make each write durable before the next
    Writethrough,
    /// Like writethrough, but bypass the page cache
    Directsync,
    /// Never flush: a crash may damage both images
    Unsafe,
}

impl From<CacheMode> for Cache {
    fn from(mode: CacheMode) -> Self {
        match mode {
            CacheMode::Writeback => Self::Writeback,
            CacheMode::Writethrough => Self::Writethrough,
            CacheMode::Unsafe => Self::Unsafe,
            CacheMode::None => Self::None,
            CacheMode::Directsync => Self::Directsync,
        }
    }
}
