//! Serves the guest of any operation: its requests, its messages, its end.

use crate::cancel::Cancel;
use crate::devices::Devices;
use crate::sandbox::{BadRequest, BufferAccess, Excess, GuestLog, Host};
use instar_guest_abi::Request;
use instar_guest_protocol::guest_message::Kind;
use std::time::Duration;

/// Whether a guest has more to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It has.
    GoesOn,
    /// That was its result: nothing may follow.
    Over,
}

/// What an operation makes of what its guest asks for and says.
pub trait Events {
    /// Execute the requests of one doorbell, as [`Host::requests`].
    ///
    /// # Errors
    /// A request that breaks a rule.
    fn requests(
        &mut self,
        devices: &mut Devices,
        memory: &dyn BufferAccess,
        requests: &mut [Request],
    ) -> Result<(), BadRequest> {
        devices.execute(memory, requests)
    }

    /// Take one message. Log lines do not come here.
    ///
    /// # Errors
    /// A message that makes no sense.
    fn message(&mut self, devices: &mut Devices, message: Kind) -> Result<Flow, BadRequest>;
}

/// The message is none of this operation's.
pub(crate) fn unexpected(operation: &str) -> BadRequest {
    BadRequest(format!("a message that a {operation} does not send"))
}

/// Serves a guest.
#[derive(Debug)]
pub struct Handler<E> {
    /// The devices of the images.
    pub devices: Devices,
    /// What the operation makes of it.
    pub events: E,
    /// Log lines of the guest.
    pub log: GuestLog,
    cancel: Cancel,
    over: bool,
}

impl<E: Events> Handler<E> {
    /// One with these devices, which the guest may only look at, for a guest that `cancel` ends.
    pub fn new(devices: Devices, events: E, cancel: Cancel) -> Self {
        Self { devices, events, log: GuestLog::default(), cancel, over: false }
    }

    fn going_on(&self, what: &str) -> Result<(), BadRequest> {
        if self.over {
            return Err(BadRequest(format!("a {what} after the result")));
        }
        Ok(())
    }
}

impl<E: Events> Host for Handler<E> {
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        self.going_on("request")?;
        self.events.requests(&mut self.devices, memory, requests)
    }

    fn message(&mut self, message: Kind) -> Result<(), BadRequest> {
        self.going_on("message")?;
        match message {
            Kind::Log(line) => self.log.take(line),
            // The runner takes panics itself.
            Kind::Panic(_) => return Err(BadRequest("a panic that is none".to_owned())),
            message => self.over = self.events.message(&mut self.devices, message)? == Flow::Over,
        }
        Ok(())
    }

    fn interrupted(&self) -> bool {
        !self.over && self.cancel.is_cancelled()
    }

    fn excess(&self, used: Duration) -> Option<Excess> {
        self.devices.excess(used)
    }
}
