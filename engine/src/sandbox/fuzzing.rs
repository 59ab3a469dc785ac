//! The module loader and the message buffer, for the fuzz targets.

use super::error::SandboxError;
use super::host::Host;
use super::memory::GuestRam;
use super::messages::Messages;
use super::module::{self, Segment};
use instar_guest_abi::MESSAGE_ADDR;
use std::ops::Range;

/// What the loader made of a module.
#[derive(Debug)]
pub struct LoadedModule {
    /// Length of the image in bytes.
    pub length: u64,
    /// Address of the entry.
    pub entry: u64,
    /// Addresses of each segment, whether it may be written, and executed.
    pub mappings: Vec<(Range<u64>, bool, bool)>,
}

/// Load a module at a page address.
///
/// # Errors
/// One clause that says what is wrong with it.
pub fn load_module(data: &[u8], base: u64) -> Result<LoadedModule, String> {
    let loaded = module::load(data, base)?;
    let mapping = |segment: Segment<'_>| (segment.range, segment.rights.write, segment.rights.execute);
    let mappings = loaded.segments.into_iter().map(mapping);
    Ok(LoadedModule { length: loaded.length, entry: loaded.entry, mappings: mappings.collect() })
}

/// Guest memory with nothing but messages in it.
pub struct MessageBuffer {
    ram: GuestRam,
    messages: Messages,
}

impl MessageBuffer {
    /// A guest that may send 1 MiB of messages.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new() -> Result<Self, SandboxError> {
        Ok(Self {
            ram: GuestRam::new().map_err(|_| SandboxError::Layout("there is no memory"))?,
            messages: Messages::new(1 << 20),
        })
    }

    /// Deliver one message.
    ///
    /// # Errors
    /// What ends the guest.
    pub fn take(&mut self, message: &[u8], handler: &mut dyn Host) -> Result<(), SandboxError> {
        if !self.ram.write(MESSAGE_ADDR, message) {
            return Err(SandboxError::protocol("a message outside memory"));
        }
        self.messages.take(&self.ram, &[], u32::try_from(message.len()).unwrap_or(u32::MAX), handler)
    }
}
