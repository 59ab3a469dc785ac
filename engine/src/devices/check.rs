//! The rules that every request is held to, before any request of its doorbell is executed.

use super::device::{Device, DeviceSet};
use crate::vm::{BadRequest, BufferAccess};
use instar_guest_abi::{request_flags, Request, RequestOp};

/// Offsets and lengths end here: what a file offset can be.
const LIMIT: u64 = i64::MAX as u64;

fn bad<T>(text: impl Into<String>) -> Result<T, BadRequest> {
    Err(BadRequest(text.into()))
}

/// Check one request.
///
/// # Errors
/// The rule that it breaks.
pub(super) fn check(
    devices: &DeviceSet,
    memory: &dyn BufferAccess,
    request: &Request,
) -> Result<RequestOp, BadRequest> {
    let Some(op) = RequestOp::from_u32(request.op) else {
        return bad(format!("a request with the unknown operation {}", request.op));
    };
    let allowed = if op == RequestOp::Zero { request_flags::DISCARD } else { 0 };
    if request.flags & !allowed != 0 {
        return bad(format!("{op:?} with the unknown flags {:#x}", request.flags));
    }
    if request.reserved0 != 0 || request.reserved1 != 0 {
        return bad(format!("{op:?} with reserved fields that are not zero"));
    }
    let Some(device) = devices.get(request.device) else {
        return bad(format!("{op:?} on device {}, which is not there", request.device));
    };
    let end = span(op, request.offset, request.length)?;
    match op {
        RequestOp::Read => buffer(op, memory, request)?,
        RequestOp::Write => {
            buffer(op, memory, request)?;
            may_write(op, device, request, end)?;
        }
        RequestOp::Copy => {
            let source_end = span(op, request.src_offset, request.length)?;
            let Some(source) = devices.get(request.src_device) else {
                return bad(format!("{op:?} from device {}, which is not there", request.src_device));
            };
            may_write(op, device, request, end)?;
            let same = source.image().identity() == device.image().identity();
            if same && overlap(request.offset, end, request.src_offset, source_end) {
                return bad(format!("{op:?} within device {} between ranges that overlap", request.device));
            }
        }
        RequestOp::Zero => {
            // It never makes a device longer: what is past the end reads as zero already.
            may_write(op, device, request, 0)?;
        }
        RequestOp::Flush => {}
        RequestOp::SetLength => may_write(op, device, request, request.offset)?,
    }
    Ok(op)
}

/// The end of a range.
fn span(op: RequestOp, offset: u64, length: u64) -> Result<u64, BadRequest> {
    match offset.checked_add(length) {
        Some(end) if end <= LIMIT => Ok(end),
        _ => bad(format!("{op:?} of {length} bytes at offset {offset}, which is out of range")),
    }
}

fn buffer(op: RequestOp, memory: &dyn BufferAccess, request: &Request) -> Result<(), BadRequest> {
    if memory.heap_slice(request.buffer, request.length).is_some() {
        return Ok(());
    }
    bad(format!("{op:?} with a buffer of {} bytes at {:#x}, outside the heap", request.length, request.buffer))
}

fn may_write(op: RequestOp, device: &Device, request: &Request, end: u64) -> Result<(), BadRequest> {
    if !device.is_writable() {
        return bad(format!("{op:?} on device {}, which is read-only", request.device));
    }
    if end > device.bound() {
        return bad(format!(
            "{op:?} up to byte {end} of device {}, which may not grow beyond {} bytes in this commit",
            request.device,
            device.bound()
        ));
    }
    Ok(())
}

/// Whether two ranges have bytes in common.
pub(super) fn overlap(start: u64, end: u64, other_start: u64, other_end: u64) -> bool {
    start < other_end && other_start < end
}
