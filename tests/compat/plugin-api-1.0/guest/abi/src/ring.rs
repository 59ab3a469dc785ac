//! Block requests from guest to host.
//!
//! The guest fills entries `0..n` of the [`Ring`], then does one `out` of `n` to
//! [`PORT_DOORBELL`](crate::PORT_DOORBELL). The host executes them strictly in order and sets
//! [`Request::status`]; at the first failure it stops, and the requests after it stay
//! [`request_status::NOT_RUN`]. A request that breaks a rule (unknown operation, absent device, write to a
//! read-only slot, overflow, buffer outside the heap, growth beyond the bound) does not fail: it ends the guest.

/// Number of entries in the ring.
pub const RING_CAPACITY: usize = 256;

/// What a [`Request`] asks for. Stored as `u32` in [`Request::op`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestOp {
    /// `length` bytes at `offset` of `device` into `buffer`; bytes past the end of the device read as zero.
    Read = 1,
    /// `length` bytes from `buffer` to `offset` of `device`.
    Write = 2,
    /// `length` bytes from `src_offset` of `src_device` to `offset` of `device`, without passing through
    /// the guest. Bytes past the end of the source read as zero. The ranges do not overlap.
    Copy = 3,
    /// Make `length` bytes at `offset` of `device` read as zero; the space is given back where the file
    /// system can ([`request_flags::DISCARD`] says that it is the point of the request).
    Zero = 4,
    /// Make everything written to `device` so far durable, as far as the cache mode promises it.
    Flush = 5,
    /// Set the length of `device` to `offset` bytes.
    SetLength = 6,
    /// Find the first data within `length` bytes at `offset` of `device`: the host replaces `offset` and `length` with
    /// the range that the data takes, of length 0 if there is none. What the range leaves out before it is a hole, which
    /// reads as zeroes. A host that does not know leaves both as they are.
    NextData = 7,
    /// How long `device` is: the host replaces `length` with its length in bytes, as it is by now.
    Length = 8,
}

impl RequestOp {
    /// The operation with this number, if there is one.
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Read,
            2 => Self::Write,
            3 => Self::Copy,
            4 => Self::Zero,
            5 => Self::Flush,
            6 => Self::SetLength,
            7 => Self::NextData,
            8 => Self::Length,
            _ => return None,
        })
    }
}

/// Bits of [`Request::flags`].
pub mod request_flags {
    /// For [`Zero`](super::RequestOp::Zero): the range is not referenced any more, and what it reads as
    /// does not matter; a host that cannot punch holes may do nothing.
    pub const DISCARD: u32 = 1;
}

/// Values of [`Request::status`]. Positive values are errno values of the host.
pub mod request_status {
    /// Executed.
    pub const OK: i32 = 0;
    /// Not executed, because an earlier request of the same doorbell failed.
    pub const NOT_RUN: i32 = -1;
}

/// One block request: 64 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// A [`RequestOp`] as a number.
    pub op: u32,
    /// Bits of [`request_flags`].
    pub flags: u32,
    /// The device that is read, written, copied to, zeroed, flushed or resized: a number
    /// from [`DeviceConfig::device`](crate::DeviceConfig::device) or [`FileDevice::device`](crate::FileDevice::device).
    pub device: u32,
    /// COPY only: the device that is copied from.
    pub src_device: u32,
    /// Byte offset on `device`; for SET_LENGTH the new length in bytes. NEXT_DATA answers here.
    pub offset: u64,
    /// Length in bytes. NEXT_DATA and LENGTH answer here.
    pub length: u64,
    /// COPY only: byte offset on `src_device`.
    pub src_offset: u64,
    /// READ and WRITE only: guest address of the buffer. In the ring it is within the heap: the core module copies smaller
    /// buffers from elsewhere through the heap, so that a driver may also use its stack.
    pub buffer: u64,
    /// Set by the host: [`request_status`].
    pub status: i32,
    /// Zero.
    pub reserved0: u32,
    /// Set by core: the address of the code that submitted it, to be named if the request breaks a rule.
    pub caller: u64,
}

const _: () = assert!(core::mem::size_of::<Request>() == 64);
const _: () = assert!(core::mem::size_of::<Ring>() as u64 <= crate::RING_SIZE);

impl Request {
    const fn base(op: RequestOp, device: u32, offset: u64, length: u64) -> Self {
        Self {
            op: op as u32,
            flags: 0,
            device,
            src_device: 0,
            offset,
            length,
            src_offset: 0,
            buffer: 0,
            status: request_status::NOT_RUN,
            reserved0: 0,
            caller: 0,
        }
    }

    /// A READ into `buffer` (an address), which the caller keeps alive and exclusive until submitted.
    #[must_use]
    pub const fn read(device: u32, offset: u64, buffer: u64, length: u64) -> Self {
        let mut r = Self::base(RequestOp::Read, device, offset, length);
        r.buffer = buffer;
        r
    }

    /// A WRITE from `buffer` (an address), which the caller keeps alive and unchanged until submitted.
    #[must_use]
    pub const fn write(device: u32, offset: u64, buffer: u64, length: u64) -> Self {
        let mut r = Self::base(RequestOp::Write, device, offset, length);
        r.buffer = buffer;
        r
    }

    /// A COPY of `length` bytes between two devices.
    #[must_use]
    pub const fn copy(src_device: u32, src_offset: u64, device: u32, offset: u64, length: u64) -> Self {
        let mut r = Self::base(RequestOp::Copy, device, offset, length);
        r.src_device = src_device;
        r.src_offset = src_offset;
        r
    }

    /// A ZERO that must read as zeroes afterwards.
    #[must_use]
    pub const fn zero(device: u32, offset: u64, length: u64) -> Self {
        Self::base(RequestOp::Zero, device, offset, length)
    }

    /// A ZERO that only gives space back.
    #[must_use]
    pub const fn discard(device: u32, offset: u64, length: u64) -> Self {
        let mut r = Self::base(RequestOp::Zero, device, offset, length);
        r.flags = request_flags::DISCARD;
        r
    }

    /// A FLUSH.
    #[must_use]
    pub const fn flush(device: u32) -> Self {
        Self::base(RequestOp::Flush, device, 0, 0)
    }

    /// A NEXT_DATA within `length` bytes at `offset`.
    #[must_use]
    pub const fn next_data(device: u32, offset: u64, length: u64) -> Self {
        Self::base(RequestOp::NextData, device, offset, length)
    }

    /// A LENGTH.
    #[must_use]
    pub const fn length_of(device: u32) -> Self {
        Self::base(RequestOp::Length, device, 0, 0)
    }

    /// A SET_LENGTH to `length` bytes.
    #[must_use]
    pub const fn set_length(device: u32, length: u64) -> Self {
        Self::base(RequestOp::SetLength, device, length, 0)
    }
}

/// The ring as it stands at [`RING_ADDR`](crate::RING_ADDR).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// The entries; a doorbell of `n` means entries `0..n`.
    pub entries: [Request; RING_CAPACITY],
}
