//! Hashing the disk: the host is told where its bytes are, and hashes them. What is plain never enters the guest; what only a
//! driver can decode is handed over in pieces.

use crate::target::Target;
use alloc::vec::Vec;
use instar_guest_protocol::commit::event::Kind;
use instar_guest_protocol::commit::Digest;
use instar_guest_sdk::abi::{DeviceConfig, Request, RequestOp, RING_CAPACITY};
use instar_guest_sdk::{BlockIo, Content, DriverResult};
use instar_guest_view::Layers;

/// The number of the device that the disk is written to, which the host hashes.
const HASHED: u32 = u32::MAX;
/// Bytes that are decoded at once.
const CHUNK: u64 = 1 << 20;

/// Have the host hash `size` bytes of the disk: what the images above the target, the top-most first, make of it, or, without any,
/// the target's own. Its disk has `virtual_size` bytes; past its end there are zeroes.
///
/// # Errors
/// What the images cannot be read for.
pub fn hash<'a>(
    target: &Target<'a, '_, '_>,
    io: &mut dyn BlockIo,
    above: &[&'a DeviceConfig],
    size: u64,
    virtual_size: u64,
) -> DriverResult<()> {
    target.tell(Kind::Digest(Digest { after: above.is_empty() }));
    let mut seen = Layers::new(target.open_below(io, above, virtual_size)?);
    let mut asked = Asked(Vec::with_capacity(RING_CAPACITY));
    let mut buffer = Vec::new();
    let mut at = 0;
    while at < size {
        let (found, end) = seen.seen_on_disk(io, at, size)?;
        match seen.place(found, at).content {
            Some(Content::Data { device, offset }) => {
                asked.push(io, Request::copy(device, offset, HASHED, at, end - at))?;
            }
            None | Some(Content::Zero) => asked.push(io, Request::zero(HASHED, at, end - at))?,
            Some(Content::Encoded { .. } | Content::Memory { .. }) => {
                asked.run(io)?;
                buffer.resize(usize::try_from(CHUNK).unwrap_or(0), 0);
                let mut from = at;
                while from < end {
                    let length = (end - from).min(CHUNK);
                    let piece = buffer.get_mut(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
                    seen.read_seen(io, found, from, piece)?;
                    io.run(&mut [Request::write(HASHED, from, piece.as_ptr() as u64, length)])?;
                    from += length;
                }
            }
        }
        at = end;
    }
    asked.run(io)
}

/// Requests that are made together: each costs an exit otherwise.
struct Asked(Vec<Request>);

impl Asked {
    fn push(&mut self, io: &mut dyn BlockIo, next: Request) -> DriverResult<()> {
        if let Some(last) = self.0.last_mut().filter(|last| is_followed_by(last, &next)) {
            last.length += next.length;
            return Ok(());
        }
        if self.0.len() == RING_CAPACITY {
            self.run(io)?;
        }
        self.0.push(next);
        Ok(())
    }

    fn run(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        if !self.0.is_empty() {
            io.run(&mut self.0)?;
            self.0.clear();
        }
        Ok(())
    }
}

/// Whether the second request goes on where the first one ends.
fn is_followed_by(last: &Request, next: &Request) -> bool {
    let copies = last.op == RequestOp::Copy as u32;
    let behind =
        last.src_device == next.src_device && last.src_offset.checked_add(last.length) == Some(next.src_offset);
    last.op == next.op && (!copies || behind)
}
