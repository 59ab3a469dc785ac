//! Takes the guest's messages.

use super::error::{printable, SandboxError};
use super::host::Host;
use super::memory::GuestRam;
use super::placed::{place, Placed};
use instar_guest_abi::{MESSAGE_ADDR, MESSAGE_SIZE};
use instar_guest_protocol::{guest_message::Kind, GuestMessage, Message, PanicMessage};

/// For how many bytes a message counts at least: a flood of empty ones is one, too.
const LEAST: u64 = 256;

/// The panic that the message of `length` bytes in the buffer reports, if it does.
pub fn panic_of(ram: &GuestRam, modules: &[Placed], length: u32) -> Option<SandboxError> {
    let mut bytes = vec![0; usize::try_from(length).ok().filter(|length| *length as u64 <= MESSAGE_SIZE)?];
    let message = ram.read(MESSAGE_ADDR, &mut bytes).then(|| GuestMessage::decode(bytes.as_slice()).ok())??;
    match message.kind {
        Some(Kind::Panic(panic)) => Some(panicked(&panic, modules)),
        _ => None,
    }
}

fn panicked(panic: &PanicMessage, modules: &[Placed]) -> SandboxError {
    SandboxError::GuestPanic { text: printable(&panic.text), place: place(modules, panic.address) }
}

/// How much the guest has sent.
#[derive(Debug)]
pub struct Messages {
    /// Number of messages.
    pub count: u64,
    bytes: u64,
    limit: u64,
}

impl Messages {
    /// None so far, and at most this many bytes.
    pub const fn new(limit: u64) -> Self {
        Self { count: 0, bytes: 0, limit }
    }

    /// Take the message of `length` bytes that is in the buffer; `modules` are where a panic may have been.
    ///
    /// # Errors
    /// [`SandboxError::GuestPanic`] if that is what it says; [`SandboxError::GuestProtocol`] if it makes no sense, or is one too
    /// many.
    pub fn take(
        &mut self,
        ram: &GuestRam,
        modules: &[Placed],
        length: u32,
        handler: &mut dyn Host,
    ) -> Result<(), SandboxError> {
        let length = u64::from(length);
        if length == 0 || length > MESSAGE_SIZE {
            return Err(SandboxError::protocol(format!(
                "a message of {length} bytes, at most {MESSAGE_SIZE} are possible"
            )));
        }
        self.count += 1;
        self.bytes = self.bytes.saturating_add(length.max(LEAST));
        if self.bytes > self.limit {
            return Err(SandboxError::protocol(format!(
                "more messages than it may send ({} messages, {} bytes)",
                self.count, self.bytes
            )));
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        if !ram.read(MESSAGE_ADDR, &mut bytes) {
            return Err(SandboxError::protocol("a message outside memory"));
        }
        let message = GuestMessage::decode(bytes.as_slice())
            .map_err(|error| SandboxError::protocol(format!("a message that cannot be decoded: {error}")))?;
        match message.kind {
            None => Err(SandboxError::protocol("a message of no known kind")),
            Some(Kind::Panic(panic)) => Err(panicked(&panic, modules)),
            Some(kind) => handler.message(kind).map_err(|bad| SandboxError::protocol(printable(&bad.0))),
        }
    }
}
