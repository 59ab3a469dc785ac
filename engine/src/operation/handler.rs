//! Serving the guest of any operation: its requests, its messages, and its end.

use super::failure::GuestFailure;
use super::meter::Meter;
use crate::cancel::Cancel;
use crate::devices::Devices;
use crate::sandbox::{BadRequest, BufferAccess, Excess, GuestLog, Host};
use instar_guest_abi::{Phase, Request, ERROR_OK};
use instar_guest_protocol::end_message::Outcome;
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::{EndMessage, FailureMessage, Message};
use std::time::Duration;

/// An operation's answers to its guest: it executes requests, takes events, and accepts or refuses a success.
///
/// # Example
///
/// Believe a guest that reports a number of bytes, but only if no byte was changed:
///
/// ```
/// use instar::devices::Devices;
/// use instar::operation::Events;
/// use instar::sandbox::BadRequest;
///
/// #[derive(Default)]
/// struct Reported(Option<u64>);
///
/// impl Events for Reported {
///     fn event(&mut self, _: &mut Devices, event: &[u8]) -> Result<(), BadRequest> {
///         let bytes = event.try_into().map_err(|_| BadRequest(format!("a number of {} bytes", event.len())))?;
///         self.0 = Some(u64::from_le_bytes(bytes));
///         Ok(())
///     }
///
///     fn succeeded(&mut self, devices: &mut Devices, _: &[u8]) -> Result<(), BadRequest> {
///         match (self.0, devices.any_changed()) {
///             (Some(_), false) => Ok(()),
///             (_, true) => Err(BadRequest("a change in an operation that only reads".to_owned())),
///             (None, _) => Err(BadRequest("a success without a number".to_owned())),
///         }
///     }
/// }
///
/// let mut events = Reported::default();
/// let devices = &mut Devices::new();
/// assert!(events.succeeded(devices, &[]).is_err(), "it has reported nothing yet");
/// events.event(devices, &512_u64.to_le_bytes()).unwrap();
/// events.succeeded(devices, &[]).unwrap();
/// ```
///
/// A method that returns an error ends the guest: the operation then fails with
/// [`GuestProtocol`](instar_guest_abi::ErrorCode::GuestProtocol), and the text of the error tells a person why.
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
        devices.execute(memory, requests)?;
        self.meter().iter().for_each(|meter| meter.settle(devices));
        Ok(())
    }

    /// The progress, if an observer asks for it. It advances after each executed batch of requests.
    fn meter(&self) -> Option<&Meter> {
        None
    }

    /// Take an event of the guest: an encoded message of the operation.
    ///
    /// # Errors
    /// An invalid message.
    fn event(&mut self, devices: &mut Devices, event: &[u8]) -> Result<(), BadRequest>;

    /// Let the guest enter a phase in which it changes other devices. An operation that only reads refuses every phase.
    ///
    /// # Errors
    /// A phase that is not allowed.
    fn enter(&mut self, devices: &mut Devices, phase: Phase) -> Result<(), BadRequest> {
        let _ = (devices, phase);
        Err(BadRequest("a change was announced in an operation that only reads".to_owned()))
    }

    /// The guest works on this step, of which it has done this many bytes of the disk.
    fn step(&mut self, step: &str, done: u64) {
        let _ = (step, done);
    }

    /// The guest says that it succeeded, with a result: an encoded message of the operation.
    ///
    /// # Errors
    /// A result that makes no sense, or contradicts what the devices saw.
    fn succeeded(&mut self, devices: &mut Devices, result: &[u8]) -> Result<(), BadRequest>;
}

/// Enter a phase of an operation whose guest has to report a plan first, and may go as far as `last`.
///
/// # Errors
/// A phase before the `plan`, or past the last one.
pub(crate) fn enter_planned<P>(
    devices: &mut Devices,
    phase: Phase,
    plan: Option<&P>,
    last: Phase,
) -> Result<(), BadRequest> {
    if plan.is_none() {
        return Err(BadRequest("a change was announced before a plan".to_owned()));
    }
    if phase > last {
        return Err(BadRequest("a change was announced where nothing may be changed".to_owned()));
    }
    devices.enter(phase).map_err(BadRequest)
}

/// A message of an operation.
///
/// # Errors
/// If it is none.
pub(crate) fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, BadRequest> {
    M::decode(bytes).map_err(|error| BadRequest(format!("a message that cannot be decoded: {error}")))
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
    /// The end that the guest has reported, if it has.
    pub end: Option<Result<(), GuestFailure>>,
    cancel: Cancel,
}

impl<E: Events> Handler<E> {
    /// Serve these devices, which the guest may only read, to a guest that `cancel` ends.
    pub fn new(devices: Devices, events: E, cancel: Cancel) -> Self {
        Self { devices, events, log: GuestLog::default(), end: None, cancel }
    }

    fn going_on(&self, what: &str) -> Result<(), BadRequest> {
        if self.end.is_some() {
            return Err(BadRequest(format!("a {what} after the result")));
        }
        Ok(())
    }

    fn ended(&mut self, message: EndMessage) -> Result<Result<(), GuestFailure>, BadRequest> {
        match message.outcome {
            None => Err(BadRequest("an end without an outcome".to_owned())),
            Some(Outcome::Result(result)) => self.events.succeeded(&mut self.devices, &result).map(Ok),
            Some(Outcome::Failure(FailureMessage { error: ERROR_OK, text, .. })) => {
                Err(BadRequest(format!("an error without a code: {text}")))
            }
            Some(Outcome::Failure(failure)) => Ok(Err(GuestFailure::reported(&failure))),
        }
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
            Kind::Event(event) => self.events.event(&mut self.devices, &event)?,
            Kind::Progress(progress) => self.events.step(&progress.step, progress.done),
            Kind::Phase(message) => {
                let phase = Phase::from_u32(message.phase)
                    .ok_or_else(|| BadRequest(format!("phase {}, which does not exist", message.phase)))?;
                self.events.enter(&mut self.devices, phase)?;
            }
            Kind::End(message) => self.end = Some(self.ended(message)?),
        }
        Ok(())
    }

    fn interrupted(&self) -> bool {
        self.end.is_none() && self.cancel.is_cancelled()
    }

    fn excess(&self, used: Duration) -> Option<Excess> {
        self.devices.excess(used)
    }
}
