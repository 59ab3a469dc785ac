//! Somebody who is asked before bytes of the target change, so that what they were can be kept: for all requests of a doorbell
//! at once, because whatever is kept has to be durable before the first of them is executed.

use super::Devices;
use instar_guest_abi::{Part, Phase, Request, RequestOp};
use std::cell::RefCell;
use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::rc::Rc;

/// Reads of the device that is about to change.
pub trait Before: Debug {
    /// Fill `out` with the bytes at `offset`, with zeroes past the end.
    ///
    /// # Errors
    /// The kernel's.
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;

    /// The next data within `from..end`: where it begins and ends; `(end, end)` if all of it is a hole.
    fn next_data(&self, from: u64, end: u64) -> (u64, u64);
}

/// Who is asked before bytes change.
pub trait BeforeChange: Debug {
    /// These ranges are about to change, or what lies behind the end of the file; the first may be empty. `go_on` fails when
    /// the operator has had enough.
    ///
    /// # Errors
    /// Why they may not. Then nothing of them is changed.
    fn before(
        &mut self,
        device: &dyn Before,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()>;
}

impl Before for super::Device {
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.read_padded(offset, out)
    }

    fn next_data(&self, from: u64, end: u64) -> (u64, u64) {
        super::Device::next_data(self, from, end)
    }
}

/// The bytes that a request changes: to the end, if it cuts a file.
fn changed(request: &Request) -> Option<Range<u64>> {
    match RequestOp::from_u32(request.op)? {
        RequestOp::Write | RequestOp::Copy | RequestOp::Zero => {
            Some(request.offset..request.offset.saturating_add(request.length))
        }
        RequestOp::SetLength => Some(request.offset..u64::MAX),
        RequestOp::Read | RequestOp::Flush | RequestOp::NextData | RequestOp::Length => None,
    }
}

impl Devices {
    /// Ask `keeper` before bytes of the target change.
    pub fn ask_before_change(&mut self, keeper: Rc<RefCell<dyn BeforeChange>>) {
        self.keeper = Some(keeper);
    }

    /// Ask about all that these requests change of the target. Requests that break a rule are asked about, too: what is kept
    /// of them does no harm, and a guest can make it keep no more than the file has.
    pub(super) fn ask_before(&mut self, requests: &[Request]) -> io::Result<()> {
        let Self { keeper: Some(keeper), slots, pace, .. } = self else { return Ok(()) };
        // Nothing of it can change in another phase.
        if self.phases.now() != Phase::Target {
            return Ok(());
        }
        for (number, device) in (0u32..).zip(slots.iter()) {
            let Some(device) = device.as_ref().filter(|device| device.part == Part::Target) else { continue };
            let of_it = requests.iter().filter(|request| request.device == number);
            let ranges: Vec<Range<u64>> = of_it.filter_map(changed).collect();
            if !ranges.is_empty() {
                keeper.borrow_mut().before(device, &ranges, &mut || pace.go_on())?;
            }
        }
        Ok(())
    }
}
