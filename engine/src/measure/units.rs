//! Counting the allocation units of a new image that the runs of a map touch.

use crate::map::MapRun;

/// The number of units that hold data.
#[derive(Debug, Default)]
pub struct Units {
    /// Bytes of a unit; 0 before that is known.
    unit: u64,
    /// Units that were counted, and the first one that was not looked at.
    count: u64,
    next: u64,
}

impl Units {
    /// Begin to count units of `unit` bytes.
    #[must_use]
    pub fn of(unit: u64) -> Self {
        Self { unit: unit.max(1), ..Self::default() }
    }

    /// Count the next run of a map. Zeroes need no space.
    pub fn take(&mut self, run: &MapRun<'_>) {
        if run.zero || !run.data || run.length == 0 {
            return;
        }
        let unit = self.unit.max(1);
        let first = (run.start / unit).max(self.next);
        self.next = run.start.saturating_add(run.length).div_ceil(unit).max(self.next);
        self.count += self.next.saturating_sub(first);
    }

    /// Return the number of units.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_unit_counts_once() {
        let layer = Path::new("");
        let run = |start, length, zero| MapRun {
            start,
            length,
            depth: 0,
            present: true,
            zero,
            data: true,
            compressed: false,
            offset: None,
            file: None,
            layer,
        };
        let mut units = Units::of(100);
        for (start, length, zero, count) in
            [(0, 50, false, 1), (50, 20, false, 1), (70, 100, true, 1), (170, 30, false, 2), (200, 201, false, 5)]
        {
            units.take(&run(start, length, zero));
            assert_eq!(units.count(), count, "{start}");
        }
    }
}
