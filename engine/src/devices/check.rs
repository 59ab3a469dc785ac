//! The rules that every request must keep. The guest may be in an attacker's hands.

use super::{Device, Devices};
use crate::sandbox::{BadRequest, BufferAccess};
use instar_guest_abi::{request_flags, Request, RequestOp};

/// Longest buffer of a READ or WRITE, in bytes: no more than guest memory holds.
const MAX_BUFFER: u64 = instar_guest_abi::GUEST_MEMORY_SIZE;

fn bad<T>(request: &Request, why: &str) -> Result<T, BadRequest> {
    Err(BadRequest(format!(
        "a request with op {}, device {}, offset {}, length {}: {why}",
        request.op, request.device, request.offset, request.length
    )))
}

/// Check one request; returns its operation.
pub fn check(devices: &Devices, memory: &dyn BufferAccess, request: &Request) -> Result<RequestOp, BadRequest> {
    let Some(op) = RequestOp::from_u32(request.op) else {
        return bad(request, "an operation that does not exist");
    };
    let allowed = if op == RequestOp::Zero { request_flags::DISCARD } else { 0 };
    if request.flags & !allowed != 0 {
        return bad(request, "flags that do not exist");
    }
    let Some(device) = devices.device(request.device) else {
        return bad(request, "a device that is absent");
    };
    let end = request.offset.checked_add(request.length).filter(|&end| i64::try_from(end).is_ok());
    let Some(end) = end else {
        return bad(request, "a range that overflows");
    };
    if !matches!(op, RequestOp::Read | RequestOp::Flush | RequestOp::NextData | RequestOp::Length) {
        devices.check_phase(device.role, op, request).or_else(|why| bad(request, why))?;
    }
    match op {
        RequestOp::Read => check_buffer(memory, request)?,
        RequestOp::Write => {
            check_buffer(memory, request)?;
            check_growth(device, request, end)?;
        }
        RequestOp::Copy => {
            check_source(devices, request)?;
            check_growth(device, request, end)?;
        }
        RequestOp::SetLength => {
            check_growth(device, request, end)?;
            // A block device stays as long as it is; giving up what is behind the new end does no harm.
        }
        RequestOp::Zero | RequestOp::Flush | RequestOp::NextData | RequestOp::Length => {}
    }
    Ok(op)
}

fn check_buffer(memory: &dyn BufferAccess, request: &Request) -> Result<(), BadRequest> {
    if request.length > MAX_BUFFER || memory.heap_slice(request.buffer, request.length).is_none() {
        return bad(request, "a buffer outside the heap");
    }
    Ok(())
}

fn check_growth(device: &Device, request: &Request, end: u64) -> Result<(), BadRequest> {
    if end > device.max_length {
        return bad(request, "more than the file may grow in this commit");
    }
    Ok(())
}

fn check_source(devices: &Devices, request: &Request) -> Result<(), BadRequest> {
    if devices.device(request.src_device).is_none() {
        return bad(request, "a source that is absent");
    }
    let source_end = request.src_offset.checked_add(request.length).filter(|&end| i64::try_from(end).is_ok());
    let Some(source_end) = source_end else {
        return bad(request, "a source range that overflows");
    };
    let overlap = request.src_offset < request.offset.saturating_add(request.length) && request.offset < source_end;
    if request.src_device == request.device && overlap {
        return bad(request, "ranges that overlap");
    }
    Ok(())
}
