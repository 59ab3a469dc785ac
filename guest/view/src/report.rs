//! What an operation reports to its host: events while it runs, and how it ended.

use alloc::string::String;
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::{end_message, EndMessage, FailureMessage, GuestMessage, Message, ProgressMessage};
use instar_guest_sdk::DriverError;

/// An operation that failed: in which of its steps, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// Name of the step, for messages; empty for an operation without steps.
    pub step: &'static str,
    /// Why.
    pub error: DriverError,
}

impl From<DriverError> for Failed {
    fn from(error: DriverError) -> Self {
        Self { step: "", error }
    }
}

/// Sends encoded messages to the host.
pub struct Reporter<'a> {
    send: &'a mut dyn FnMut(&[u8]),
}

impl<'a> Reporter<'a> {
    /// One that sends with this function, which takes one encoded [`GuestMessage`] at a time.
    pub fn new(send: &'a mut dyn FnMut(&[u8])) -> Self {
        Self { send }
    }

    fn kind(&mut self, kind: Kind) {
        (self.send)(&GuestMessage { kind: Some(kind) }.encode_to_vec());
    }

    /// Something that the operation tells before its end: a message that only its own half in the host understands.
    pub fn event(&mut self, event: &impl Message) {
        self.kind(Kind::Event(event.encode_to_vec()));
    }

    /// Report how many guest bytes of this step are done.
    pub fn progress(&mut self, step: &str, done: u64, total: u64) {
        self.kind(Kind::Progress(ProgressMessage { step: String::from(step), done, total }));
    }

    /// How the operation ended: with a result that only its own half in the host understands, or with a failure. Nothing may
    /// be sent after it.
    pub fn end(&mut self, ended: Result<impl Message, impl Into<Failed>>) {
        let outcome = match ended {
            Ok(result) => end_message::Outcome::Result(result.encode_to_vec()),
            Err(failed) => {
                let Failed { step, error } = failed.into();
                end_message::Outcome::Failure(FailureMessage {
                    error: error.code.number(),
                    device: error.device.unwrap_or(u32::MAX),
                    offset: error.offset.unwrap_or(u64::MAX),
                    errno: error.errno,
                    text: error.text,
                    step: String::from(step),
                })
            }
        };
        self.kind(Kind::End(EndMessage { outcome: Some(outcome) }));
    }
}
