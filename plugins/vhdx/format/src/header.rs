//! The two headers, the root of everything that is in a file (2.2.2).

use crate::{crc, put, u16_at, u32_at, u64_at, FormatError, Guid, ALIGNMENT};
use alloc::format;
use core::ops::Range;

/// The signature of the file type identifier (2.2.1).
pub const SIGNATURE: [u8; 8] = *b"vhdxfile";
/// Bytes of a header.
pub const HEADER_BYTES: usize = 4096;
/// Where the headers stand in the file, in bytes.
pub const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];

const HEAD: [u8; 4] = *b"head";

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The one with the higher number counts.
    pub sequence: u64,
    /// Identifies the file's bytes.
    pub file_write: Guid,
    /// Identifies what a guest reads: children record it.
    pub data_write: Guid,
    /// Entries of the log with this GUID count; null if the log is empty.
    pub log_guid: Guid,
    /// Length of the log in bytes.
    pub log_length: u32,
    /// Byte offset of the log.
    pub log_offset: u64,
    log_version: u16,
    version: u16,
}

impl Header {
    /// A header with an empty log of `log_length` bytes at byte `log_offset`.
    #[must_use]
    pub const fn new(sequence: u64, file_write: Guid, data_write: Guid, log_offset: u64, log_length: u32) -> Self {
        let (log_guid, log_version, version) = (Guid::NULL, 0, 1);
        Self { sequence, file_write, data_write, log_guid, log_length, log_offset, log_version, version }
    }

    /// Take a header apart; `None` if there is none: signature or checksum are wrong.
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        (bytes[..4] == HEAD && crc::is_right(bytes)).then(|| Self {
            sequence: u64_at(bytes, 8),
            file_write: Guid::at(bytes, 16),
            data_write: Guid::at(bytes, 32),
            log_guid: Guid::at(bytes, 48),
            log_version: u16_at(bytes, 64),
            version: u16_at(bytes, 66),
            log_length: u32_at(bytes, 68),
            log_offset: u64_at(bytes, 72),
        })
    }

    /// The bytes of a header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        put(&mut bytes, 0, &HEAD);
        put(&mut bytes, 8, &self.sequence.to_le_bytes());
        put(&mut bytes, 16, &self.file_write.0);
        put(&mut bytes, 32, &self.data_write.0);
        put(&mut bytes, 48, &self.log_guid.0);
        put(&mut bytes, 64, &self.log_version.to_le_bytes());
        put(&mut bytes, 66, &self.version.to_le_bytes());
        put(&mut bytes, 68, &self.log_length.to_le_bytes());
        put(&mut bytes, 72, &self.log_offset.to_le_bytes());
        crc::seal(&mut bytes);
        bytes
    }

    /// The byte range of the log.
    #[must_use]
    pub const fn log(&self) -> Range<u64> {
        self.log_offset..self.log_offset.saturating_add(self.log_length as u64)
    }

    /// Whether the log has to be replayed before anything else is read.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        !self.log_guid.is_null()
    }

    fn verify(&self, offset: u64) -> Result<(), FormatError> {
        if self.version != 1 {
            let text = format!("version {} of VHDX is not known", self.version);
            return Err(FormatError::unsupported(offset, text));
        }
        if self.log_version != 0 && self.is_dirty() {
            let text = format!("version {} of the log is not known, and the log is to be replayed", self.log_version);
            return Err(FormatError::unsupported(offset, text));
        }
        if self.sequence > u64::MAX / 2 {
            let text = format!("the sequence number {} of the header is higher than anybody counts", self.sequence);
            return Err(FormatError::corrupt(offset, text));
        }
        let log = self.log();
        let aligned = self.log_offset.is_multiple_of(ALIGNMENT) && u64::from(self.log_length).is_multiple_of(ALIGNMENT);
        if !aligned || self.log_offset < ALIGNMENT || log.is_empty() || log.end > i64::MAX as u64 {
            let text = format!(
                "the log of {} bytes at byte {} is not whole MiB behind the header section",
                self.log_length, self.log_offset
            );
            return Err(FormatError::corrupt(offset, text));
        }
        Ok(())
    }
}

/// Both headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// The current one.
    pub current: Header,
    /// Which of the two it is: an index of [`HEADER_OFFSETS`].
    pub slot: usize,
    /// The other one is valid, too.
    pub both: bool,
}

impl Headers {
    /// Choose the current header: the valid one, or, of two, the one with the higher sequence number (2.2.2).
    ///
    /// # Errors
    /// If none is valid, if nobody knows which of two is current, and for what the current one says of version and log.
    pub fn choose(first: &[u8; HEADER_BYTES], second: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        let (current, slot, both) = match (Header::parse(first), Header::parse(second)) {
            (None, None) => {
                return Err(FormatError::corrupt(HEADER_OFFSETS[0], "neither of the two headers has a valid checksum"));
            }
            (Some(header), None) => (header, 0, false),
            (None, Some(header)) => (header, 1, false),
            (Some(first), Some(second)) if first.sequence > second.sequence || first == second => (first, 0, true),
            (Some(first), Some(second)) if first.sequence < second.sequence => (second, 1, true),
            (Some(header), Some(_)) => {
                let text = format!("the two headers differ and have the same sequence number, {}", header.sequence);
                return Err(FormatError::corrupt(HEADER_OFFSETS[0], text));
            }
        };
        current.verify(HEADER_OFFSETS[slot])?;
        Ok(Self { current, slot, both })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn header(sequence: u64) -> Header {
        Header::new(sequence, Guid([1; 16]), Guid([2; 16]), ALIGNMENT, 1 << 20)
    }

    #[test]
    fn the_higher_number_counts() {
        let none = [0; HEADER_BYTES];
        let chosen = |first: &[u8; HEADER_BYTES], second| Headers::choose(first, second).map(|it| (it.slot, it.both));
        let (five, six) = (header(5).encode(), header(6).encode());
        assert_eq!(chosen(&five, &six), Ok((1, true)));
        assert_eq!(chosen(&six, &five), Ok((0, true)));
        assert_eq!(chosen(&five, &none), Ok((0, false)));
        assert_eq!(chosen(&none, &five), Ok((1, false)));
        assert_eq!(chosen(&five, &five), Ok((0, true)));
        assert!(chosen(&none, &none).unwrap_err().text.contains("neither"));
        let other = Header { data_write: Guid([9; 16]), ..header(5) }.encode();
        assert!(chosen(&five, &other).unwrap_err().text.contains("same sequence number"));
        let mut torn = six;
        torn[4000] ^= 1;
        assert_eq!(chosen(&five, &torn), Ok((0, false)));
        assert_eq!(Headers::choose(&five, &none).unwrap().current, header(5));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let none = [0; HEADER_BYTES];
        let refused = |header: Header| Headers::choose(&header.encode(), &none).unwrap_err().text;
        assert!(refused(Header { version: 2, ..header(5) }).contains("version 2 of VHDX"));
        assert!(Headers::choose(&Header { log_version: 1, ..header(5) }.encode(), &none).is_ok());
        let dirty = Header { log_version: 1, log_guid: Guid([3; 16]), ..header(5) };
        assert!(refused(dirty).contains("version 1 of the log"));
        assert!(refused(header(u64::MAX)).contains("sequence number"));
        for (log_offset, log_length) in
            [(0, 1 << 20), (1 << 20, 0), (4096, 1 << 20), (1 << 20, 4096), (u64::MAX << 20, 1 << 20)]
        {
            assert!(refused(Header { log_offset, log_length, ..header(5) }).contains("whole MiB"), "{log_offset}");
        }
    }
}
