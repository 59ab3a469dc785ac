//! A device that a driver changes in order, and that knows whether anything is left to flush.

use crate::error::DriverResult;
use crate::io::BlockIo;
use instar_guest_abi::{Request, RequestOp};

/// Writes to one device, and flushes only if something was written since the last flush.
///
/// A driver that orders its changes puts a [barrier](Self::barrier) between two of them. Whether a flush is due at that point
/// depends on every write before it. Tracking this by hand, a driver that forgot one write would lose the order in a power
/// loss.
#[derive(Clone, Debug)]
pub struct OrderedWriter {
    device: u32,
    unflushed: bool,
}

impl OrderedWriter {
    /// Wrap the device with this number, on which nothing is unflushed.
    #[must_use]
    pub const fn new(device: u32) -> Self {
        Self { device, unflushed: false }
    }

    /// Return the number of the device.
    #[must_use]
    pub const fn device(&self) -> u32 {
        self.device
    }

    /// Whether a [barrier](Self::barrier) would flush.
    #[must_use]
    pub const fn is_unflushed(&self) -> bool {
        self.unflushed
    }

    /// Record that something else, such as a cache of tables, wrote to the device, so that the next barrier flushes.
    pub fn written(&mut self) {
        self.unflushed = true;
    }

    /// Execute requests that change the device, in one batch; do nothing if there are none. A batch that ends with a flush of
    /// the device leaves nothing unflushed.
    ///
    /// # Errors
    /// As [`BlockIo::run`]; some of the requests may have been executed.
    pub fn run(&mut self, io: &mut dyn BlockIo, requests: &mut [Request]) -> DriverResult<()> {
        let Some(last) = requests.last() else { return Ok(()) };
        let flushed = last.op == RequestOp::Flush as u32 && last.device == self.device;
        self.unflushed = true;
        io.run(requests)?;
        self.unflushed = !flushed;
        Ok(())
    }

    /// Write `bytes` at byte `offset`.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    pub fn write(&mut self, io: &mut dyn BlockIo, offset: u64, bytes: &[u8]) -> DriverResult<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.run(io, &mut [Request::write(self.device, offset, bytes.as_ptr() as u64, bytes.len() as u64)])
    }

    /// Make `length` bytes from `offset` on read as zeroes.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    pub fn zero(&mut self, io: &mut dyn BlockIo, offset: u64, length: u64) -> DriverResult<()> {
        self.run(io, &mut [Request::zero(self.device, offset, length)])
    }

    /// Copy `length` bytes within the device, from byte `from` to byte `to`.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    pub fn copy(&mut self, io: &mut dyn BlockIo, from: u64, to: u64, length: u64) -> DriverResult<()> {
        self.run(io, &mut [Request::copy(self.device, from, self.device, to, length)])
    }

    /// Set the length of the file in bytes; new bytes read as zeroes.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    pub fn set_length(&mut self, io: &mut dyn BlockIo, length: u64) -> DriverResult<()> {
        self.run(io, &mut [Request::set_length(self.device, length)])
    }

    /// Flush if anything was written since the last flush, so that all of it is durable before any later change.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    pub fn barrier(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if self.unflushed {
            io.flush(self.device)?;
            self.unflushed = false;
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "memory"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::memory::{Change, MemoryDevices};
    use alloc::vec;
    use instar_guest_abi::{Phase, DEVICE_OUTPUT};

    fn flushes(io: &MemoryDevices) -> usize {
        io.log.iter().filter(|change| matches!(change, Change::Flush { .. })).count()
    }

    #[test]
    fn a_barrier_flushes_what_there_is() {
        let mut io = MemoryDevices::new([(DEVICE_OUTPUT, vec![7; 16])]);
        io.enter(Phase::Target);
        let mut out = OrderedWriter::new(DEVICE_OUTPUT);
        out.barrier(&mut io).unwrap();
        out.write(&mut io, 0, &[]).unwrap();
        out.run(&mut io, &mut []).unwrap();
        out.barrier(&mut io).unwrap();
        assert_eq!(io.log, vec![]);
        out.write(&mut io, 0, &[1, 2]).unwrap();
        out.copy(&mut io, 0, 4, 2).unwrap();
        out.zero(&mut io, 8, 8).unwrap();
        assert!(out.is_unflushed());
        out.barrier(&mut io).unwrap();
        out.barrier(&mut io).unwrap();
        assert_eq!(flushes(&io), 1);
        assert_eq!(io.files[&DEVICE_OUTPUT], [1, 2, 7, 7, 1, 2, 7, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
        out.run(&mut io, &mut [Request::set_length(DEVICE_OUTPUT, 4), Request::flush(DEVICE_OUTPUT)]).unwrap();
        out.barrier(&mut io).unwrap();
        assert_eq!(flushes(&io), 2);
        out.written();
        out.barrier(&mut io).unwrap();
        assert_eq!(flushes(&io), 3);
    }

    #[test]
    fn what_failed_may_be_there_in_part() {
        let mut io = MemoryDevices::new([(DEVICE_OUTPUT, vec![7; 16])]);
        io.enter(Phase::Target);
        io.fail_at = Some(0);
        let mut out = OrderedWriter::new(DEVICE_OUTPUT);
        out.set_length(&mut io, 4).unwrap_err();
        assert!(out.is_unflushed());
    }
}
