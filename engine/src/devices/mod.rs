//! The images as the guest sees them: dumb block devices.
//!
//! Each is a descriptor that was opened once, with a mode and a bound on its length. The guest requests reads, writes, copies,
//! zeroing, flushes and changes of length in batches; the host checks every request before it executes it, and ends a guest
//! that breaks a rule.

mod aligned;
mod allowance;
mod before_change;
mod cache;
mod check;
mod clone;
mod compare;
mod copy;
mod device;
mod direct;
mod evict;
mod execute;
pub mod lock;
mod merge;
mod pace;
mod parallel_copy;
mod phases;
mod piece;
mod salvage;
mod statistics;
mod transfer;
mod wipe;
mod workers;
mod writeback;
mod zero;
mod zero_writes;
mod zeroes;

pub(crate) use aligned::AlignedBuffer;
pub use before_change::{Before, BeforeChange};
pub use cache::Cache;
pub(crate) use compare::first_difference;
pub use compare::{Comparison, Unequal, COMPARED};
pub use device::Device;
pub use pace::{Pace, Watch};
pub use phases::Phases;
pub use statistics::Statistics;
pub use workers::Workers;
pub(crate) use zero::zero_within as make_zero;
pub use zero_writes::ZeroWrites;

use crate::sandbox::Excess;
use allowance::Allowance;
use copy::Copier;
use direct::Direct;
use instar_guest_abi::{Request, FIRST_FILE_DEVICE, MAX_FILE_DEVICES};
use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// One more than the highest number of a device.
const MAX_DEVICES: usize = FIRST_FILE_DEVICE as usize + MAX_FILE_DEVICES;

/// The devices of a chain.
#[derive(Debug, Default)]
pub struct Devices {
    slots: Vec<Option<Device>>,
    copier: Copier,
    workers: Option<Workers>,
    phases: Phases,
    pace: Pace,
    cache: Cache,
    /// Whether flushes are left to the code that gives the target its name.
    unnamed: bool,
    /// What becomes of zeroes that are written.
    zero_writes: ZeroWrites,
    statistics: Statistics,
    allowance: Allowance,
    /// Who is asked before bytes of the target change.
    keeper: Option<Rc<RefCell<dyn BeforeChange>>>,
}

/// The index of a device number.
fn index(device: u32) -> usize {
    usize::try_from(device).unwrap_or(usize::MAX)
}

impl Devices {
    /// Make an empty set of devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Attach a device under a number below [`FIRST_FILE_DEVICE`] + [`MAX_FILE_DEVICES`]. Others are ignored.
    pub fn attach(&mut self, number: u32, device: Device) {
        let place = index(number);
        debug_assert!(place < MAX_DEVICES);
        if place >= MAX_DEVICES {
            return;
        }
        if place >= self.slots.len() {
            self.slots.resize_with(place + 1, || None);
        }
        self.allowance.add(device.allocated());
        if let Some(slot) = self.slots.get_mut(place) {
            *slot = Some(device);
        }
    }

    /// Return the pace of data, its observer, and its brake.
    pub fn pace_mut(&mut self) -> &mut Pace {
        &mut self.pace
    }

    /// Set the threads that copy large amounts of data in parallel.
    pub fn set_workers(&mut self, workers: Option<Workers>) {
        self.workers = workers;
    }

    /// What a flush, and a write, promise.
    ///
    /// # Errors
    /// The number of a device whose file system knows no direct I/O, and what it says.
    pub fn set_cache(&mut self, cache: Cache) -> Result<(), (u32, io::Error)> {
        self.cache = cache;
        for (number, device) in (0u32..).zip(&mut self.slots) {
            let Some(device) = device else { continue };
            device.eager = matches!(cache, Cache::Writeback | Cache::Writethrough);
            if cache.is_direct() {
                device.direct = Some(Direct::begin(&device.file).map_err(|error| (number, error))?);
            }
        }
        Ok(())
    }

    /// Ignore the guest's flushes of the target: it is a new file that nobody can see before it is complete and flushed. A
    /// crash before that leaves nothing of it, so the order in which its parts reach the disk does not matter.
    pub fn leave_flushes_to_the_end(&mut self) {
        self.unnamed = true;
    }

    /// What becomes of zeroes that are written, instead of writing them.
    pub fn set_zero_writes(&mut self, way: ZeroWrites) {
        self.zero_writes = way;
    }

    /// Return the counters of the data that was moved so far.
    #[must_use]
    pub fn stats(&self) -> &Statistics {
        &self.statistics
    }

    /// Whether the guest changed any of them, or tried to.
    #[must_use]
    pub fn any_changed(&self) -> bool {
        self.slots.iter().flatten().any(Device::is_changed)
    }

    /// Count bytes of a device that the host read because the guest claimed data there.
    pub fn count_read(&mut self, device: u32, bytes: u64) {
        self.allowance.count(&Request::read(device, 0, 0, bytes));
    }

    /// Return the work of the guest that is out of proportion to the allocated size of the files, if nothing has changed yet.
    /// `used` is the guest's processor time.
    #[must_use]
    pub fn excess(&self, used: Duration) -> Option<Excess> {
        self.allowance.excess(used).filter(|_| !self.any_changed())
    }

    /// Copy unreadable sectors of this device as zeroes from now on.
    pub fn salvage(&mut self, number: u32) {
        if let Ok(device) = self.device_mut(number) {
            device.salvage = Some(RefCell::default());
        }
    }

    /// Return the device with this number.
    #[must_use]
    pub fn device(&self, number: u32) -> Option<&Device> {
        self.slots.get(index(number))?.as_ref()
    }

    fn device_mut(&mut self, number: u32) -> io::Result<&mut Device> {
        let device = self.slots.get_mut(index(number)).and_then(Option::as_mut);
        device.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }
}

/// A system call, again as long as a signal interrupts it.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    rustix::io::retry_on_intr(&mut call).map_err(io::Error::from)
}

#[cfg(test)]
mod tests;
