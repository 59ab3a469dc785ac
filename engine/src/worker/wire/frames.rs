//! The messages of a worker, as they arrive in pieces.

use super::event::Event;
use prost::Message;
use std::io;

/// Longest message in bytes.
const MESSAGE_MAX: usize = 16 << 20;

/// Messages that arrive in pieces.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
}

impl Frames {
    /// Take the next piece, and hand over each message that is whole.
    ///
    /// # Errors
    /// `InvalidData` for a message that is too long, or is none.
    pub fn take(&mut self, piece: &[u8], mut each: impl FnMut(Event)) -> io::Result<()> {
        self.bytes.extend_from_slice(piece);
        loop {
            let mut rest = self.bytes.as_slice();
            let length = match prost::decode_length_delimiter(&mut rest) {
                Ok(length) => length,
                // The longest length takes ten bytes.
                Err(_) if self.bytes.len() < 10 => return Ok(()),
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            };
            if length > MESSAGE_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a message that is too long"));
            }
            let Some(message) = rest.get(..length) else { return Ok(()) };
            let event = Event::decode(message).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let used = self.bytes.len() - rest.len() + length;
            self.bytes.drain(..used);
            each(event);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_cannot_make_its_caller_take_memory() {
        let too_long = [0xff, 0xff, 0xff, 0xff, 0x0f];
        assert!(Frames::default().take(&too_long, |_| ()).is_err());
        assert!(Frames::default().take(&[0xff; 32], |_| ()).is_err());
    }
}
