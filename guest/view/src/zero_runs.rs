//! Where in the data of an extent zeroes are.

use crate::read_extent;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::ErrorCode;
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Extent, Source};

/// Guest bytes whose units are all zero, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZeroRun {
    /// The first one.
    pub start: u64,
    /// The one behind the last.
    pub end: u64,
    /// They are all zero.
    pub zero: bool,
}

/// Looks for zeroes.
#[derive(Debug)]
pub struct ZeroRuns {
    /// Bytes that are looked at together: the disk is cut at multiples of them.
    unit: u64,
    buffer: Vec<u8>,
}

impl ZeroRuns {
    /// Bytes that are read at once, at most.
    pub const CHUNK: u64 = 1 << 20;

    /// Look at units of `unit` bytes.
    #[must_use]
    pub fn of(unit: u64) -> Self {
        Self { unit: unit.clamp(1, Self::CHUNK), buffer: Vec::new() }
    }

    /// Where the bytes that are read together with those at `at` end: with the last whole unit.
    #[must_use]
    pub fn next(&self, at: u64) -> u64 {
        (at.saturating_add(Self::CHUNK) / self.unit * self.unit).max(at.saturating_add(self.unit))
    }

    /// The runs of guest bytes `range` of an extent of `source`, which are read.
    ///
    /// # Errors
    /// What the source says.
    pub fn within(
        &mut self,
        io: &mut dyn BlockIo,
        source: &mut dyn Source,
        extent: &Extent,
        range: Range<u64>,
    ) -> DriverResult<Vec<ZeroRun>> {
        let missing = || DriverError::new(ErrorCode::InternalOverflow, "a part of an extent");
        let length = usize::try_from(range.end.saturating_sub(range.start)).map_err(|_| missing())?;
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        let bytes = self.buffer.get_mut(..length).ok_or_else(missing)?;
        read_extent(io, source, extent, range.start, bytes)?;
        let place = |byte: u64| usize::try_from(byte - range.start).unwrap_or(length);
        let mut runs: Vec<ZeroRun> = Vec::new();
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min((start / self.unit + 1).saturating_mul(self.unit));
            let zero = is_zero(bytes.get(place(start)..place(end)).unwrap_or_default());
            match runs.last_mut() {
                Some(last) if last.zero == zero => last.end = end,
                _ => runs.push(ZeroRun { start, end, zero }),
            }
            start = end;
        }
        Ok(runs)
    }
}

/// Whether all bytes are zero: by pieces that the compiler looks at with few instructions.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}
