//! The services that a sandbox needs from the rest of the engine while a guest runs.

use instar_guest_abi::Request;
use instar_guest_protocol::guest_message;
use std::time::Duration;
use vm_memory::VolatileSlice;

/// Access to the buffers that requests name.
///
/// # Example
///
/// Take a copy of the bytes that a guest wants to write. The guest may change them at any time, so a host that first checks and
/// then writes them must do both with the same copy:
///
/// ```
/// use instar::sandbox::{BadRequest, BufferAccess};
/// use instar_guest_abi::Request;
///
/// fn copy_of(memory: &dyn BufferAccess, request: &Request) -> Result<Vec<u8>, BadRequest> {
///     let buffer = memory
///         .heap_slice(request.buffer, request.length)
///         .ok_or_else(|| BadRequest(format!("a buffer at {:#x}, outside the heap", request.buffer)))?;
///     let mut bytes = vec![0; buffer.len()];
///     buffer.copy_to(&mut bytes);
///     Ok(bytes)
/// }
/// ```
pub trait BufferAccess {
    /// Return the guest memory `address..address + length`, if it lies wholly within the heap.
    fn heap_slice(&self, address: u64, length: u64) -> Option<VolatileSlice<'_>>;
}

/// A request or message that breaks the protocol: it ends the guest. The text is one clause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRequest(pub String);

/// Work out of proportion to the allocated size of the images, with the device that caused most of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excess {
    /// The device number.
    pub device: u32,
    /// The exceeded bound, in one clause.
    pub text: String,
}

/// Serves a running guest.
///
/// # Example
///
/// A host that answers no request and takes every message, for a guest that needs no device:
///
/// ```
/// use instar::sandbox::{BadRequest, BufferAccess, Host};
/// use instar_guest_abi::Request;
/// use instar_guest_protocol::guest_message::Kind;
///
/// struct Deaf;
///
/// impl Host for Deaf {
///     fn requests(&mut self, _: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
///         Err(BadRequest(format!("{} requests, but no device", requests.len())))
///     }
///
///     fn message(&mut self, _: Kind) -> Result<(), BadRequest> {
///         Ok(())
///     }
/// }
/// ```
pub trait Host {
    /// Execute the requests of one doorbell, strictly in order, and set each `status`; stop at the first that
    /// fails with an errno and leave the rest `NOT_RUN`.
    ///
    /// # Errors
    /// [`BadRequest`] when a request breaks a rule: the guest is ended.
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest>;

    /// Take one message of the guest.
    ///
    /// # Errors
    /// [`BadRequest`] for an invalid message: the guest is ended.
    fn message(&mut self, message: guest_message::Kind) -> Result<(), BadRequest>;

    /// Called before each doorbell is served, and several times a second while the guest runs: `true` asks the
    /// runner to end the guest now.
    fn interrupted(&self) -> bool {
        false
    }

    /// Called like [`Host::interrupted`], with the processor time that the guest has used so far: work out of
    /// proportion to what the images hold ends the guest.
    fn excess(&self, used: Duration) -> Option<Excess> {
        let _ = used;
        None
    }
}
