//! What the KVM runner asks of the rest of the engine while the guest runs.

use instar_guest_abi::Request;
use instar_guest_protocol::guest_message;
use std::time::Duration;
use vm_memory::VolatileSlice;

/// Access to the buffers that requests name.
pub trait BufferAccess {
    /// The guest memory `address..address + length`, if it lies wholly within the heap.
    fn heap_slice(&self, address: u64, length: u64) -> Option<VolatileSlice<'_>>;
}

/// A request or message that breaks the protocol: it ends the guest. The text is one clause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRequest(pub String);

/// Work out of proportion to what the images hold: the device that most of it was about, and one clause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excess {
    /// The device number.
    pub device: u32,
    /// What was too much.
    pub text: String,
}

/// Serves a running guest.
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
    /// [`BadRequest`] when the message makes no sense: the guest is ended.
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
