//! Comparing ranges of devices, several at a time: what was written is read back and has to be what the layers hold.
//!
//! The target is read past the page cache, in whole blocks, where its file system can: what the disk holds is what counts, and one
//! thread waits for it while another compares.

use super::aligned::AlignedBuffer;
use super::direct::Direct;
use super::piece::PIECE;
use super::workers::Task;
use super::{Device, Devices};
use instar_guest_abi::DeviceRole;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::{error, fmt};

/// Bytes of a comparison at most: both sides, each with the rest of two blocks, fit into the buffer of a thread.
pub const COMPARED: u64 = PIECE / 2 - 64 * 1024;
/// Bytes of a block at most that direct I/O asks for here; with larger ones a device is read through the page cache.
const MOST_BLOCK: u64 = 32 * 1024;

/// Two ranges of devices that are to hold the same.
#[derive(Clone, Copy, Debug)]
pub struct Comparison {
    /// The guest offset of their first byte.
    pub at: u64,
    /// Their length, [`COMPARED`] bytes at most.
    pub length: u64,
    /// Device and offset of each; zeroes where there is none.
    pub sides: [Option<(u32, u64)>; 2],
}

/// Why two ranges are not known to be equal.
#[derive(Debug)]
pub enum Unequal {
    /// They differ first at this guest offset.
    Differs(u64),
    /// This device could not be read at this offset.
    Unreadable(u32, u64, io::Error),
    /// The operator wants to stop.
    Interrupted,
}

impl fmt::Display for Unequal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Differs(at) => write!(f, "the two differ at guest offset {at}"),
            Self::Unreadable(device, offset, error) => write!(f, "device {device} at offset {offset}: {error}"),
            Self::Interrupted => f.write_str("interrupted"),
        }
    }
}

impl error::Error for Unequal {}

/// A range of a file that a thread reads.
#[derive(Clone, Debug)]
struct Side {
    file: Arc<File>,
    device: u32,
    offset: u64,
    /// Reads are of whole blocks of this many bytes; 1 through the page cache.
    block: u64,
}

/// A comparison as a thread does it.
#[derive(Clone, Debug)]
pub struct Pair {
    at: u64,
    length: u64,
    sides: [Option<Side>; 2],
    /// Its place in the order.
    index: usize,
}

impl Side {
    /// Read `length` bytes into a buffer, with zeroes past the end of the file. Returns the place of the first of them there.
    fn read(&self, length: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let start = self.offset - self.offset % self.block;
        let end = self.offset.saturating_add(length).checked_next_multiple_of(self.block);
        let too_long = || io::Error::from_raw_os_error(libc::EINVAL);
        let whole = end.and_then(|end| usize::try_from(end - start).ok()).ok_or_else(too_long)?;
        let bytes = buffer.get_mut(..whole).ok_or_else(too_long)?;
        let mut done = 0;
        while done < bytes.len() {
            match self.file.read_at(bytes.get_mut(done..).unwrap_or_default(), start.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            // In the middle of a block ends the file.
            if !(done as u64).is_multiple_of(self.block) {
                break;
            }
        }
        bytes.get_mut(done..).unwrap_or_default().fill(0);
        usize::try_from(self.offset - start).map_err(|_| too_long())
    }
}

impl Pair {
    fn compare(&self, buffer: &mut AlignedBuffer) -> Result<(), Unequal> {
        let (one, two) = buffer.bytes().split_at_mut(usize::try_from(PIECE / 2).unwrap_or(0));
        let length = usize::try_from(self.length).unwrap_or(0);
        let read = |side: &Option<Side>, buffer: &mut [u8]| match side {
            Some(side) => {
                side.read(self.length, buffer).map_err(|error| Unequal::Unreadable(side.device, side.offset, error))
            }
            None => {
                buffer.get_mut(..length).unwrap_or_default().fill(0);
                Ok(0)
            }
        };
        let [first, second] = &self.sides;
        let (from, to) = (read(first, one)?, read(second, two)?);
        let (one, two) = (one.get(from..from + length), two.get(to..to + length));
        let (Some(one), Some(two)) = (one, two) else { return Err(Unequal::Differs(self.at)) };
        match first_difference(one, two) {
            None => Ok(()),
            Some(equal) => Err(Unequal::Differs(self.at.saturating_add(equal as u64))),
        }
    }
}

/// The place of the first byte that differs in two slices of the same length.
pub fn first_difference(one: &[u8], two: &[u8]) -> Option<usize> {
    // Comparing slices is much faster than comparing bytes.
    (one != two).then(|| one.iter().zip(two).position(|(one, two)| one != two)).flatten()
}

impl Task for Pair {
    fn length(&self) -> u64 {
        self.length
    }

    fn first(&self) -> usize {
        self.index
    }

    fn run(&self, buffer: &mut AlignedBuffer) -> Result<(), (usize, io::Error)> {
        self.compare(buffer).map_err(|unequal| (self.index, io::Error::other(unequal)))
    }
}

impl Device {
    /// How it is read to be compared: the target past the page cache.
    fn compared_by(&self) -> Option<Direct> {
        let possible = self.direct.or_else(|| self.direct_possible().filter(|_| self.role == DeviceRole::Target));
        possible.filter(|direct| direct.block() <= MOST_BLOCK)
    }
}

impl Devices {
    /// Compare ranges, which ascend in the guest's disk. Where several are not equal, the first one is told.
    ///
    /// # Errors
    /// [`Unequal`].
    pub fn compare(&mut self, parts: &[Comparison]) -> Result<(), Unequal> {
        if parts.is_empty() {
            return Ok(());
        }
        let Self { slots, workers, pace, .. } = self;
        let slot = |number: u32| slots.get(super::index(number)).and_then(Option::as_ref);
        let side = |place: Option<(u32, u64)>| {
            let (number, offset) = place?;
            let device = slot(number)?;
            let block = device.compared_by().map_or(1, Direct::block);
            Some(Side { file: Arc::clone(&device.file), device: number, offset, block })
        };
        let pair = |(index, part): (usize, &Comparison)| Pair {
            at: part.at,
            length: part.length,
            sides: part.sides.map(side),
            index,
        };
        let pairs = parts.iter().enumerate().map(pair);
        // A device that is open for both is switched for the moment.
        let switched =
            slots.iter().flatten().filter(|device| device.direct.is_none() && device.compared_by().is_some());
        let _direct: Vec<Switched<'_>> = switched.map(|device| Switched::on(&device.file)).collect();
        let limited = pace.is_limited();
        let mut each = |bytes| {
            pace.moved(bytes)?;
            pace.go_on()
        };
        let done = match workers {
            Some(workers) if !limited => workers.run(pairs.collect(), each),
            _ => {
                let mut buffer = AlignedBuffer::new(PIECE);
                pairs.into_iter().try_for_each(|pair| {
                    pair.run(&mut buffer)?;
                    each(pair.length).map_err(|error| (pair.index, error))
                })
            }
        };
        done.map_err(|(_, error)| match error.downcast::<Unequal>() {
            Ok(unequal) => unequal,
            Err(_) => Unequal::Interrupted,
        })
    }
}

/// A file that is read past the page cache as long as this lives.
struct Switched<'f>(&'f File);

impl<'f> Switched<'f> {
    fn on(file: &'f File) -> Self {
        // Where it cannot be, whole blocks are read through the page cache, which was dropped.
        let _ = Direct::switch(file, true);
        Self(file)
    }
}

impl Drop for Switched<'_> {
    fn drop(&mut self) {
        let _ = Direct::switch(self.0, false);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use instar_guest_abi::DEVICE_OUTPUT;

    const SIZE: u64 = 3 << 20;

    /// Two devices that hold the same, the second one a number of bytes later, on a file system with direct I/O if there is one.
    fn devices(skip: u64) -> Devices {
        let mut devices = Devices::new();
        let bytes: Vec<u8> = (0..SIZE).map(|at| (at % 251) as u8).collect();
        for (number, at, role) in [(0, 0, DeviceRole::Read), (DEVICE_OUTPUT, skip, DeviceRole::Target)] {
            let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            file.write_all_at(&bytes, at).unwrap();
            file.sync_all().unwrap();
            devices.attach(number, Device::new(file, true, at + SIZE, at + SIZE, false).with_role(role));
        }
        devices
    }

    fn parts(skip: u64) -> Vec<Comparison> {
        let step = usize::try_from(COMPARED).unwrap();
        let all = (0..SIZE).step_by(step).map(|at| Comparison {
            at,
            length: COMPARED.min(SIZE - at),
            sides: [Some((0, at)), Some((DEVICE_OUTPUT, at + skip))],
        });
        all.collect()
    }

    #[test]
    fn equal_is_equal_and_the_first_difference_is_told() {
        for (skip, threads) in [(0, true), (0, false), (512, true), (1, true), (4097, false)] {
            let mut devices = devices(skip);
            devices.set_workers(threads.then(|| super::super::Workers::start().unwrap()));
            devices.compare(&parts(skip)).unwrap();
            let target = devices.device(DEVICE_OUTPUT).unwrap().file().clone();
            for at in [SIZE - 1, 2_000_000, COMPARED, COMPARED - 1, 0] {
                let mut byte = [0];
                target.read_exact_at(&mut byte, at + skip).unwrap();
                target.write_all_at(&[!byte[0]], at + skip).unwrap();
                let found = devices.compare(&parts(skip));
                assert!(
                    matches!(found, Err(Unequal::Differs(first)) if first == at),
                    "{skip} {threads} {at}: {found:?}"
                );
            }
        }
    }

    #[test]
    fn what_is_past_the_end_is_zero_and_so_is_nothing() {
        let mut devices = devices(0);
        let beyond = Comparison { at: 5, length: 8192, sides: [None, Some((DEVICE_OUTPUT, SIZE))] };
        devices.compare(&[beyond]).unwrap();
        let half = Comparison { sides: [None, Some((DEVICE_OUTPUT, SIZE - 4096))], ..beyond };
        // The byte before is of the pattern.
        assert!(matches!(devices.compare(&[half]), Err(Unequal::Differs(5 | 6))));
    }

    #[test]
    fn a_device_that_cannot_be_read_is_named() {
        let mut devices = devices(0);
        let closed = File::options().write(true).open("/dev/null").unwrap();
        devices.attach(1, Device::new(closed, false, SIZE, SIZE, true).with_role(DeviceRole::Read));
        let part = Comparison { at: 0, length: 4096, sides: [Some((1, 4096)), Some((DEVICE_OUTPUT, 0))] };
        let found = devices.compare(&[part]);
        assert!(matches!(found, Err(Unequal::Unreadable(1, 4096, _))), "{found:?}");
    }
}
