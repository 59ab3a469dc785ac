//! A device that a driver changes in an order: it knows whether there is anything that a flush would make durable.

use crate::error::DriverResult;
use crate::io::BlockIo;
use instar_guest_abi::{Request, RequestOp};

/// Writes to one device, and flushes only if something was written since the last flush.
///
/// A driver that orders its changes puts a [barrier](Self::barrier) between two of them. Whether a flush is due there depends
/// on all that was written on the way: kept by hand, a place that forgets to say so loses the order in a power loss.
#[derive(Clone, Debug)]
pub struct OrderedWriter {
    device: u32,
    unflushed: bool,
}

impl OrderedWriter {
    /// The device with this number, of which nothing is unflushed.
    #[must_use]
    pub const fn new(device: u32) -> Self {
        Self { device, unflushed: false }
    }

    /// The number of the device.
    #[must_use]
    pub const fn device(&self) -> u32 {
        self.device
    }

    /// Whether a [barrier](Self::barrier) would flush.
    #[must_use]
    pub const fn is_unflushed(&self) -> bool {
        self.unflushed
    }

    /// Somebody else writes to the device, a cache of tables for one: the next barrier flushes.
    pub fn written(&mut self) {
        self.unflushed = true;
    }

    /// Execute requests that change the device, in one batch; nothing happens if there are none. A batch that ends with a
    /// flush of the device leaves nothing unflushed.
    ///
    /// # Errors
    /// As [`BlockIo::run`]; some of the requests may have been executed then.
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

    /// Have `length` bytes from `offset` on read as zeroes.
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

    /// Make the file `length` bytes long; what is new reads as zeroes.
    ///
    /// # Errors
    /// As [`BlockIo::run`].
    pub fn set_length(&mut self, io: &mut dyn BlockIo, length: u64) -> DriverResult<()> {
        self.run(io, &mut [Request::set_length(self.device, length)])
    }

    /// Flush, if anything was written since the last flush: all of it is durable when this returns, before whatever comes next.
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
