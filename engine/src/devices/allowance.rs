//! The amount of work that a guest may request before it changes anything, in proportion to the allocated size of the files.
//!
//! A few kilobytes of hostile metadata can claim terabytes of tables. Drivers skip holes and refuse overlaps; this bound covers
//! whatever they miss, and drivers of other authors. It is generous: drivers read valid metadata about ten times at most, in
//! pieces of 4 KiB or more.
//!
//! The bound ends with the first change of a file: a commit that stops in the middle helps nobody.

use crate::sandbox::Excess;
use instar_guest_abi::{Request, RequestOp};
use std::collections::BTreeMap;
use std::time::Duration;

/// Bytes that may be read in any case, whatever the files hold: a second's worth.
const READ_BYTES: u64 = 1 << 30;
/// Bytes that may be read for each byte that the files take on the disk.
const READ_FOR_EACH: u64 = 256;
/// Requests that are granted in any case.
const REQUESTS: u64 = 1 << 20;
/// Bytes on the disk that allow one more request.
const BYTES_FOR_A_REQUEST: u64 = 16;
/// Processor time of the guest that is granted in any case.
const TIME: Duration = Duration::from_secs(60);
/// Bytes on the disk that allow one more second.
const BYTES_FOR_A_SECOND: u64 = 1 << 20;

/// The allocated size of the files, and the work that was requested so far.
#[derive(Clone, Debug, Default)]
pub struct Allowance {
    /// Bytes that the files take on the disk.
    allocated: u64,
    /// Bytes that were read.
    read: u64,
    requests: u64,
    /// Requests by device.
    by_device: BTreeMap<u32, u64>,
}

impl Allowance {
    /// Add a file that takes `allocated` bytes on the disk.
    pub fn add(&mut self, allocated: u64) {
        self.allocated = self.allocated.saturating_add(allocated);
    }

    /// Count a request before its execution.
    pub fn count(&mut self, request: &Request) {
        self.requests += 1;
        if request.op == RequestOp::Read as u32 {
            self.read = self.read.saturating_add(request.length);
        }
        *self.by_device.entry(request.device).or_default() += 1;
    }

    /// Return the exceeded bound, if any. `used` is the processor time of the guest.
    #[must_use]
    pub fn excess(&self, used: Duration) -> Option<Excess> {
        let read = self.allocated.saturating_mul(READ_FOR_EACH).saturating_add(READ_BYTES);
        let requests = REQUESTS.saturating_add(self.allocated / BYTES_FOR_A_REQUEST);
        let time = TIME.saturating_add(Duration::from_secs(self.allocated / BYTES_FOR_A_SECOND));
        let clause = if self.read > read {
            format!("{} bytes of it were read", self.read)
        } else if self.requests > requests {
            format!("{} requests were made for it", self.requests)
        } else if used > time {
            format!("{} s of processor time were used for it", used.as_secs())
        } else {
            return None;
        };
        let busiest = self.by_device.iter().max_by_key(|(_, &count)| count);
        let text = format!("its metadata is out of proportion: the images take {} bytes, but {clause}", self.allocated);
        Some(Excess { device: busiest.map_or(u32::MAX, |(&device, _)| device), text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(allowance: &mut Allowance, count: u64, length: u64) {
        (0..count).for_each(|_| allowance.count(&Request::read(3, 0, 0, length)));
    }

    #[test]
    fn each_bound_follows_from_what_the_files_hold() {
        for allocated in [0u64, 1 << 20, 1 << 40] {
            let mut allowance = Allowance::default();
            allowance.add(allocated);
            let limit = READ_BYTES + allocated * READ_FOR_EACH;
            reads(&mut allowance, 1, limit);
            assert_eq!(allowance.excess(TIME), None);
            reads(&mut allowance, 1, 1);
            let excess = allowance.excess(Duration::ZERO);
            assert!(excess.is_some_and(|excess| excess.device == 3 && excess.text.contains("bytes of it were read")));
        }
        let mut allowance = Allowance::default();
        allowance.add(1 << 24);
        assert_eq!(allowance.excess(TIME + Duration::from_secs(16)), None);
        assert!(allowance.excess(TIME + Duration::from_secs(17)).is_some());
        (0..(1 << 20) + (1 << 20)).for_each(|_| allowance.count(&Request::next_data(0, 0, 1)));
        assert_eq!(allowance.excess(Duration::ZERO), None);
        allowance.count(&Request::next_data(0, 0, 1));
        assert!(allowance.excess(Duration::ZERO).is_some_and(|excess| excess.text.contains("requests")));
    }
}
