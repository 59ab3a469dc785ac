//! A raw backing that looks like an image of another format, and the commit that made it look so.
//!
//! A guest may write the first bytes of any format into its disk. The commit brings them into the raw backing, and when it is
//! interrupted and run again, the backing looks like an image that a hostile overlay calls raw. What tells them apart is that
//! a repeated commit writes the same bytes once more: it may go on if the first of its writes are what the backing has there
//! already, the whole mark among them, and as long as nothing changes where formats have their headers. So the header of
//! somebody else's image is never overwritten. The host itself compares: it need not believe the guest.

use crate::devices::Devices;
use crate::plugins::Mark;
use crate::sandbox::BufferAccess;
use instar_guest_abi::{Request, RequestOp, DEVICE_OUTPUT};
use std::io;
use std::ops::Range;

/// The bounds on the bytes at the start of a file that a repeated commit leaves as they are: its first cluster, if it
/// is an image, which holds the names of other files.
const HEADER: (u64, u64) = (64 << 10, 2 << 20);
/// Bytes that are compared at once.
const PIECE: usize = 64 << 10;

/// A commit into a backing that looks like an image of another format.
#[derive(Debug)]
pub struct Repeated {
    /// The part of the mark that was found to equal the written bytes, and the mark's end.
    verified: u64,
    end: u64,
    /// The number of bytes at the start of the file that stay as they are.
    header: u64,
    /// Whether a request was refused because it would have changed those bytes.
    refused: bool,
}

impl Repeated {
    /// Prepare a commit into a backing with this mark; `None` if the mark is not at the start of the file.
    #[must_use]
    pub fn new(mark: &Mark) -> Option<Self> {
        let header = mark.cluster_size.clamp(HEADER.0, HEADER.1);
        let Range { start, end } = mark.bytes;
        (end <= header).then_some(Self { verified: start, end, header, refused: false })
    }

    /// Whether a request was refused.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// Decide whether this request may be executed next. After the first refusal, none may.
    pub fn allows(&mut self, devices: &Devices, memory: &dyn BufferAccess, request: &Request) -> bool {
        self.refused |= !self.keeps_headers(devices, memory, request);
        !self.refused
    }

    fn keeps_headers(&mut self, devices: &Devices, memory: &dyn BufferAccess, request: &Request) -> bool {
        let op = RequestOp::from_u32(request.op);
        let changes = matches!(op, Some(RequestOp::Write | RequestOp::Copy | RequestOp::Zero | RequestOp::SetLength));
        if request.device != DEVICE_OUTPUT || !changes {
            return true;
        }
        if op != Some(RequestOp::SetLength) {
            let head = self.header.saturating_sub(request.offset).min(request.length);
            if head != 0 && !is_there(devices, memory, request, head).unwrap_or(false) {
                return false;
            }
            if request.offset <= self.verified {
                self.verified = self.verified.max(request.offset.saturating_add(head));
            }
        }
        // Bytes before the mark cannot be attributed to the overlay.
        self.verified >= self.end
    }
}

/// Whether the first `head` bytes that a request writes equal the bytes in the backing.
fn is_there(devices: &Devices, memory: &dyn BufferAccess, request: &Request, head: u64) -> io::Result<bool> {
    let Some(target) = devices.device(request.device) else { return Ok(false) };
    let (mut wanted, mut found) = (vec![0; PIECE], vec![0; PIECE]);
    let mut done = 0;
    while done < head {
        let length = usize::try_from(head - done).unwrap_or(PIECE).min(PIECE);
        let (wanted, found) = (&mut wanted[..length], &mut found[..length]);
        target.read_padded(request.offset.saturating_add(done), found)?;
        match RequestOp::from_u32(request.op) {
            Some(RequestOp::Write) => {
                let address = request.buffer.saturating_add(done);
                // One that is not in the heap ends the guest when it is executed; until then it is not the same.
                let Some(slice) = memory.heap_slice(address, length as u64) else { return Ok(false) };
                slice.copy_to(wanted);
            }
            Some(RequestOp::Copy) => {
                let Some(source) = devices.device(request.src_device) else { return Ok(false) };
                source.read_padded(request.src_offset.saturating_add(done), wanted)?;
            }
            _ => wanted.fill(0),
        }
        if wanted != found {
            return Ok(false);
        }
        done += length as u64;
    }
    Ok(true)
}
