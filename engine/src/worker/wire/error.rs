//! An error, as one process of this program tells it to another.

use super::{bytes, path};
use crate::error::{Error, Role};
use instar_guest_abi::ErrorCode;
use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub struct ErrorEvent {
    #[prost(uint32, tag = "1")]
    code: u32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(bytes = "vec", optional, tag = "3")]
    path: Option<Vec<u8>>,
    #[prost(string, optional, tag = "4")]
    role: Option<String>,
    #[prost(uint32, optional, tag = "5")]
    device: Option<u32>,
    #[prost(uint64, optional, tag = "6")]
    offset: Option<u64>,
    #[prost(int32, tag = "7")]
    errno: i32,
    #[prost(string, tag = "8")]
    step: String,
    #[prost(uint32, optional, tag = "9")]
    holder: Option<u32>,
}

/// An error as bytes, for a process that is told it by another one of the same program.
#[must_use]
pub fn encode_error(error: &Error) -> Vec<u8> {
    error_event(error).encode_to_vec()
}

/// The error that [`encode_error`] made these bytes of; `None` if it did not.
#[must_use]
pub fn decode_error(bytes: &[u8]) -> Option<Error> {
    ErrorEvent::decode(bytes).ok().map(error_of)
}

/// The message of an error.
pub fn error_event(error: &Error) -> ErrorEvent {
    ErrorEvent {
        code: error.code.number(),
        message: error.message.clone(),
        path: error.path().map(bytes),
        role: error.role().map(|role| role.name().to_owned()),
        device: error.device(),
        offset: error.offset(),
        errno: error.errno().unwrap_or(0),
        step: error.step().unwrap_or_default().to_owned(),
        holder: error.holder(),
    }
}

/// The error of a message.
pub fn error_of(event: ErrorEvent) -> Error {
    let code = ErrorCode::from_u32(event.code).unwrap_or(ErrorCode::InternalOverflow);
    let error = Error::new(code, event.message)
        .on_device(event.device, event.offset)
        .with_errno(event.errno)
        .in_step(&event.step)
        .held_by(event.holder);
    let error = event.path.iter().fold(error, |error, bytes| error.at_path(&path(bytes)));
    event.role.as_deref().and_then(Role::from_name).into_iter().fold(error, Error::in_role)
}
