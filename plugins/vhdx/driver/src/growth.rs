//! How a disk will grow: planned before anything changes.

/// How a disk will grow.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    /// Its new size in bytes, whole logical sectors.
    pub size: u64,
    /// Bytes of a region for a table that has to be moved to have room.
    pub moved: Option<u32>,
}

impl Growth {
    /// Bytes that the file gets for the table.
    pub fn new_bytes(&self) -> u64 {
        self.moved.map_or(0, u64::from)
    }
}
