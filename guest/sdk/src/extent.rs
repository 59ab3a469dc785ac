//! A run of guest bytes, as drivers and operations see it.
//!
//! Between modules an extent is a record of numbers ([`WireExtent`]). [`ffi`](crate::ffi) checks it once, where it enters a
//! module; inside the module its content is an enum, so that no driver has to handle kinds that do not exist.
//!
//! [`WireExtent`]: instar_guest_abi::WireExtent

use crate::error::{overflow, DriverError, DriverResult};
use crate::io::BlockIo;
use alloc::format;
use core::ops::Range;
use instar_guest_abi::{ErrorCode, ExtentKind, Request};

/// A run of guest bytes that a layer holds itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First guest byte.
    pub guest_offset: u64,
    /// Length in bytes, at least 1.
    pub length: u64,
    /// The content of the bytes.
    pub content: Content,
}

/// The content of an [`Extent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Plain bytes of a device.
    Data {
        /// The number of the device.
        device: u32,
        /// Byte offset on the device.
        offset: u64,
    },
    /// Zeroes.
    Zero,
    /// Bytes that only the source can decode, because they are compressed: ask [`Source::read`](crate::Source::read).
    Encoded {
        /// A number by which the source finds them again.
        location: u64,
    },
    /// Plain bytes in guest memory. Only operations make such extents, from decoded data, and only sinks see them.
    Memory {
        /// The address of the first byte.
        address: u64,
    },
}

impl Content {
    /// Return the kind under which messages to the host name it.
    #[must_use]
    pub fn kind(&self) -> ExtentKind {
        match self {
            Self::Data { .. } => ExtentKind::Data,
            Self::Zero => ExtentKind::Zero,
            Self::Encoded { .. } => ExtentKind::Encoded,
            Self::Memory { .. } => ExtentKind::Memory,
        }
    }

    /// Return the content after its first `length` bytes. `None` for encoded bytes, of which only the beginning has a location,
    /// and on overflow.
    #[must_use]
    pub fn after(self, length: u64) -> Option<Self> {
        Some(match self {
            Self::Data { device, offset } => Self::Data { device, offset: offset.checked_add(length)? },
            Self::Zero => Self::Zero,
            Self::Encoded { .. } => return None,
            Self::Memory { address } => Self::Memory { address: address.checked_add(length)? },
        })
    }

    /// Make the request that writes `length` bytes of it to byte `offset` of `device`.
    ///
    /// # Errors
    /// [`ErrorCode::InternalOverflow`] for encoded bytes: the operation decodes them before it writes.
    pub fn request(self, device: u32, offset: u64, length: u64) -> DriverResult<Request> {
        match self {
            Self::Data { device: from, offset: at } => Ok(Request::copy(from, at, device, offset, length)),
            Self::Zero => Ok(Request::zero(device, offset, length)),
            Self::Memory { address } => Ok(Request::write(device, offset, address, length)),
            Self::Encoded { .. } => {
                let text = "an extent that is not decoded cannot be written";
                Err(DriverError::new(ErrorCode::InternalOverflow, text).at(device, offset))
            }
        }
    }

    /// Read its first bytes into `buffer`, for a sink that has to know the arriving data.
    ///
    /// # Errors
    /// As [`BlockIo::run`]; [`ErrorCode::InternalOverflow`] for encoded bytes, which only their source can decode.
    pub fn read(self, io: &mut dyn BlockIo, buffer: &mut [u8]) -> DriverResult<()> {
        match self {
            Self::Data { device, offset } => io.read(device, offset, buffer)?,
            Self::Zero => buffer.fill(0),
            Self::Memory { address } => {
                // SAFETY: as for the buffer of a request, the operation that has made the extent keeps its bytes alive and
                // unchanged until the call of the sink returns; `buffer` is exclusive, so the two do not overlap.
                unsafe { core::ptr::copy_nonoverlapping(address as *const u8, buffer.as_mut_ptr(), buffer.len()) }
            }
            Self::Encoded { .. } => return Err(overflow("an extent that is not decoded")),
        }
        Ok(())
    }
}

impl Extent {
    /// Describe `length` guest bytes from `guest_offset` on, stored at byte `offset` of `device`.
    #[must_use]
    pub const fn data(guest_offset: u64, length: u64, device: u32, offset: u64) -> Self {
        Self { guest_offset, length, content: Content::Data { device, offset } }
    }

    /// Describe `length` guest bytes from `guest_offset` on that are zero.
    #[must_use]
    pub const fn zero(guest_offset: u64, length: u64) -> Self {
        Self { guest_offset, length, content: Content::Zero }
    }

    /// Describe `length` guest bytes from `guest_offset` on that only the source can decode; `location` is private to the
    /// source.
    #[must_use]
    pub const fn encoded(guest_offset: u64, length: u64, location: u64) -> Self {
        Self { guest_offset, length, content: Content::Encoded { location } }
    }

    /// Return the first guest byte after it; exact for a checked extent.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.guest_offset.saturating_add(self.length)
    }

    /// Return [`Extent::end`] for an extent that arrives in an image of `virtual_size` bytes.
    ///
    /// # Errors
    /// [`ErrorCode::BackingTooSmall`] if it exceeds the end of the image.
    pub fn end_within(&self, virtual_size: u64) -> DriverResult<u64> {
        checked_end(self.guest_offset, self.length, virtual_size).ok_or_else(|| {
            let text = format!("data at guest offset {} lies past the end of the backing", self.guest_offset);
            DriverError::new(ErrorCode::BackingTooSmall, text)
        })
    }

    /// Whether its content is zeroes.
    #[must_use]
    pub const fn is_zero(&self) -> bool {
        matches!(self.content, Content::Zero)
    }

    /// Whether only the source can decode it.
    #[must_use]
    pub const fn is_encoded(&self) -> bool {
        matches!(self.content, Content::Encoded { .. })
    }

    /// Whether `next` follows both in the guest and in its storage, so that the two can be merged. Encoded extents are never
    /// merged.
    #[must_use]
    pub fn is_followed_by(&self, next: &Self) -> bool {
        self.guest_offset.checked_add(self.length) == Some(next.guest_offset)
            && self.content.after(self.length) == Some(next.content)
    }

    /// Return the part of it in a range of guest bytes, or `None` if there is none. The part of an encoded extent tells how
    /// much arrives and where; the source can only decode the whole.
    #[must_use]
    pub fn clip(&self, range: Range<u64>) -> Option<Self> {
        let (start, end) = (self.guest_offset.max(range.start), self.end().min(range.end));
        let length = end.checked_sub(start).filter(|&length| length > 0)?;
        let content = self.content.after(start - self.guest_offset).unwrap_or(self.content);
        Some(Self { guest_offset: start, length, content })
    }

    /// Split it into its parts in aligned blocks of `block` guest bytes: one for each block that it touches, ascending.
    ///
    /// # Errors
    /// [`ErrorCode::InternalOverflow`] for blocks of 0 bytes.
    pub fn blocks(self, block: u64) -> DriverResult<impl Iterator<Item = Self>> {
        if block == 0 {
            return Err(overflow("the size of a block"));
        }
        let (mut at, end) = (self.guest_offset, self.end());
        Ok(core::iter::from_fn(move || {
            let next = (at / block).saturating_add(1).saturating_mul(block).min(end);
            let part = self.clip(at..next);
            at = next;
            part
        }))
    }

    /// Make the request that writes it to byte `offset` of `device`.
    ///
    /// # Errors
    /// As [`Content::request`].
    pub fn request(&self, device: u32, offset: u64) -> DriverResult<Request> {
        self.content.request(device, offset, self.length)
    }
}

/// Compute the end of `length` bytes from `offset` on, if it is at most `limit`. Every range that an image names goes through
/// here.
#[must_use]
pub fn checked_end(offset: u64, length: u64, limit: u64) -> Option<u64> {
    offset.checked_add(length).filter(|&end| end <= limit)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn what_follows_in_both_places_is_one() {
        let first = Extent::data(100, 10, 3, 500);
        assert!(first.is_followed_by(&Extent::data(110, 5, 3, 510)));
        assert!(!first.is_followed_by(&Extent::data(110, 5, 3, 511)));
        assert!(!first.is_followed_by(&Extent::data(110, 5, 4, 510)));
        assert!(!first.is_followed_by(&Extent::data(111, 5, 3, 510)));
        assert!(!first.is_followed_by(&Extent::zero(110, 5)));
        assert!(Extent::zero(0, 10).is_followed_by(&Extent::zero(10, 1)));
        assert!(!Extent::encoded(0, 10, 7).is_followed_by(&Extent::encoded(10, 10, 17)));
        let memory = |guest_offset, address| Extent { guest_offset, length: 4, content: Content::Memory { address } };
        assert!(memory(0, 64).is_followed_by(&memory(4, 68)));
        assert!(!Extent::data(0, 10, 0, u64::MAX - 5).is_followed_by(&Extent::data(10, 1, 0, 4)));
    }

    #[test]
    fn a_part_keeps_its_place() {
        let extent = Extent::data(100, 50, 3, 1000);
        assert_eq!(extent.clip(0..100), None);
        assert_eq!(extent.clip(150..u64::MAX), None);
        assert_eq!(extent.clip(0..u64::MAX), Some(extent));
        assert_eq!(extent.clip(120..130), Some(Extent::data(120, 10, 3, 1020)));
        assert_eq!(Extent::encoded(100, 50, 9).clip(120..130), Some(Extent::encoded(120, 10, 9)));
        let blocks: Vec<_> = extent.blocks(32).unwrap().collect();
        let parts = [(100, 28), (128, 22)].map(|(at, length)| Extent::data(at, length, 3, 900 + at));
        assert_eq!(blocks, parts);
        assert!(extent.blocks(0).is_err());
        let last = Extent::zero(u64::MAX - 3, 3);
        assert_eq!(last.blocks(1 << 40).unwrap().collect::<Vec<_>>(), [last]);
    }

    #[test]
    fn an_end_is_checked() {
        assert_eq!(Extent::zero(5, 5).end_within(10), Ok(10));
        for (extent, size) in [(Extent::zero(5, 6), 10), (Extent::zero(u64::MAX, 2), u64::MAX)] {
            assert_eq!(extent.end_within(size).unwrap_err().code, ErrorCode::BackingTooSmall);
        }
        assert_eq!(
            (checked_end(3, 4, 7), checked_end(3, 4, 6), checked_end(u64::MAX, 1, u64::MAX)),
            (Some(7), None, None)
        );
    }

    #[cfg(feature = "memory")]
    #[test]
    fn content_is_read_unless_it_is_encoded() {
        let mut io = crate::memory::MemoryDevices::new([(3, alloc::vec![1, 2, 3, 4])]);
        let bytes = [7u8, 8, 9];
        let mut read = |content: Content| {
            let mut buffer = [0xff; 2];
            content.read(&mut io, &mut buffer).map(|()| buffer)
        };
        assert_eq!(read(Content::Data { device: 3, offset: 1 }), Ok([2, 3]));
        assert_eq!(read(Content::Zero), Ok([0, 0]));
        let memory = Content::Memory { address: bytes.as_ptr() as u64 };
        assert_eq!(memory.after(1).map(&mut read), Some(Ok([8, 9])));
        assert_eq!(read(Content::Encoded { location: 1 }).unwrap_err().code, ErrorCode::InternalOverflow);
    }

    #[test]
    fn each_content_has_its_request() {
        assert_eq!(Extent::data(0, 8, 3, 40).request(16, 9), Ok(Request::copy(3, 40, 16, 9, 8)));
        assert_eq!(Extent::zero(0, 8).request(16, 9), Ok(Request::zero(16, 9, 8)));
        assert_eq!(Content::Memory { address: 64 }.request(16, 9, 8), Ok(Request::write(16, 9, 64, 8)));
        let error = Extent::encoded(0, 8, 1).request(16, 9).unwrap_err();
        assert_eq!((error.code, error.device, error.offset), (ErrorCode::InternalOverflow, Some(16), Some(9)));
    }
}
