//! The commit operation as a guest module.
#![no_std]
#![no_main]

extern crate alloc;

use instar_guest_protocol::{guest_message::Kind, CommitResultMessage, GuestMessage, Message};
use instar_guest_sdk::abi::ERROR_NOT_IMPLEMENTED;
use instar_guest_sdk::ffi::Operation;
use instar_guest_sdk::{export_operation, BlockIo};

/// Placeholder until the operation is there.
fn commit(_operation: &Operation<'_>, _io: &mut dyn BlockIo, send: &mut dyn FnMut(&[u8])) {
    let result = CommitResultMessage {
        error: ERROR_NOT_IMPLEMENTED,
        error_device: u32::MAX,
        error_offset: u64::MAX,
        error_text: "the commit operation is not there yet".into(),
        ..CommitResultMessage::default()
    };
    send(&GuestMessage { kind: Some(Kind::CommitResult(result)) }.encode_to_vec());
}

export_operation!(commit);
