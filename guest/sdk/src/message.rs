//! The two messages that are sent from below the operation, encoded without a library for it: lines and phases.

use core::fmt;

/// Send a line that `-v` shows: `log!("{} tables were read", count)`. Does nothing outside of a guest.
#[macro_export]
macro_rules! log {
    ($($arguments:tt)*) => {
        $crate::log_line(::core::format_args!($($arguments)*))
    };
}

/// Send a line: the implementation of [`log!`](crate::log!).
#[doc(hidden)]
pub fn log_line(line: fmt::Arguments<'_>) {
    #[cfg(feature = "guest")]
    crate::runtime::send(&log(line));
    #[cfg(not(feature = "guest"))]
    let _ = line;
}

#[cfg(any(feature = "guest", test))]
pub use encode::{log, phase};

#[cfg(any(feature = "guest", test))]
mod encode {
    use alloc::vec::Vec;
    use core::fmt;
    use instar_guest_abi::{Phase, MESSAGE_SIZE};

    /// Field `log` of a `GuestMessage`, a message of its own.
    const LOG: u8 = 3 << 3 | 2;
    /// Field `phase`, likewise.
    const PHASE: u8 = 10 << 3 | 2;
    /// Field `text` of a `LogMessage`.
    const TEXT: u8 = 1 << 3 | 2;
    /// Field `phase` of a `PhaseMessage`.
    const NUMBER: u8 = 1 << 3;
    /// Bytes of a line at most: tags and lengths have to fit beside it.
    pub const LONGEST: usize = 1024;
    const _: () = assert!((LONGEST as u64) < MESSAGE_SIZE / 2);

    fn varint(mut value: usize, out: &mut Vec<u8>) {
        while value >= 0x80 {
            out.push((value.to_le_bytes()[0] & 0x7f) | 0x80);
            value >>= 7;
        }
        out.push(value.to_le_bytes()[0]);
    }

    fn field(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(body.len() + 4);
        out.push(tag);
        varint(body.len(), &mut out);
        out.extend_from_slice(body);
        out
    }

    /// The encoded message for a line of the log. Text that is too long is cut at a character boundary.
    #[must_use]
    pub fn log(line: fmt::Arguments<'_>) -> Vec<u8> {
        let text = alloc::fmt::format(line);
        let mut end = text.len().min(LONGEST);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        field(LOG, &field(TEXT, &text.as_bytes()[..end]))
    }

    /// The encoded message for a phase.
    #[must_use]
    pub fn phase(phase: Phase) -> Vec<u8> {
        let mut body = alloc::vec![NUMBER];
        varint(phase as usize, &mut body);
        field(PHASE, &body)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    extern crate std;
    use super::encode::LONGEST;
    use super::*;
    use instar_guest_abi::Phase;
    use instar_guest_protocol::guest_message::Kind;
    use instar_guest_protocol::{GuestMessage, Message};
    use std::string::String;

    fn decoded(bytes: &[u8]) -> Kind {
        GuestMessage::decode(bytes).unwrap().kind.unwrap()
    }

    #[test]
    fn lines_are_what_prost_encodes() {
        for length in [0, 1, 100, 120, 127, 128, 200, LONGEST, 3 * LONGEST] {
            let text = "x".repeat(length);
            let Kind::Log(line) = decoded(&log(format_args!("{text}"))) else { unreachable!() };
            assert_eq!(line.text, text[..length.min(LONGEST)]);
        }
        let umlauts = "ä".repeat(LONGEST);
        let cut = log(format_args!("x{umlauts}"));
        let Kind::Log(line) = decoded(&cut) else { unreachable!() };
        assert_eq!(line.text, String::from("x") + &"ä".repeat((LONGEST - 1) / 2));
    }

    #[test]
    fn phases_are_what_prost_encodes() {
        for number in [Phase::Inspect, Phase::Target, Phase::Overlay, Phase::Children] {
            let Kind::Phase(message) = decoded(&phase(number)) else { unreachable!() };
            assert_eq!(message.phase, number as u32);
        }
    }
}
