//! A hook that runs before bytes of the target change, so that their old content can be kept. It runs once for all requests of
//! a doorbell, because the kept content has to be durable before the first of them is executed.

use super::Devices;
use instar_guest_abi::{DeviceRole, Phase, Request, RequestOp};
use std::cell::RefCell;
use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::rc::Rc;

/// The device that is about to change, as a [`BeforeChange`] may read it.
///
/// # Example
///
/// A disk in memory, for the test of a hook:
///
/// ```
/// use instar::devices::Before;
/// use std::io;
///
/// #[derive(Debug)]
/// struct Memory(Vec<u8>);
///
/// impl Before for Memory {
///     fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
///         out.fill(0);
///         let rest = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).unwrap_or_default();
///         out.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
///         Ok(())
///     }
///
///     fn next_data(&self, from: u64, end: u64) -> (u64, u64) {
///         (from, end) // There are no holes in memory.
///     }
/// }
///
/// let mut sector = [0xff; 4];
/// Memory(vec![1, 2]).read(1, &mut sector).unwrap();
/// assert_eq!(sector, [2, 0, 0, 0], "zeroes past the end");
/// ```
pub trait Before: Debug {
    /// Fill `out` with the bytes at `offset`, with zeroes past the end.
    ///
    /// # Errors
    /// The kernel's.
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;

    /// Find the next data within `from..end` and return its bounds; `(end, end)` if the whole range is a hole.
    fn next_data(&self, from: u64, end: u64) -> (u64, u64);
}

/// The hook that runs before bytes change.
///
/// # Example
///
/// Refuse every change of the first sector:
///
/// ```
/// use instar::devices::{Before, BeforeChange};
/// use std::{io, ops::Range};
///
/// #[derive(Debug)]
/// struct Protected;
///
/// impl BeforeChange for Protected {
///     fn before(
///         &mut self,
///         _: &dyn Before,
///         ranges: &[Range<u64>],
///         _: &mut dyn FnMut() -> io::Result<()>,
///     ) -> io::Result<()> {
///         match ranges.iter().find(|range| !range.is_empty() && range.start < 512) {
///             Some(_) => Err(io::ErrorKind::PermissionDenied.into()),
///             None => Ok(()),
///         }
///     }
/// }
/// ```
pub trait BeforeChange: Debug {
    /// Act before these ranges change, which may lie past the end of the file; the first may be empty. `go_on` fails if the
    /// operator has ended the operation.
    ///
    /// # Errors
    /// The reason why they must not change. Then none of them does.
    fn before(
        &mut self,
        device: &dyn Before,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()>;

    /// Data is moving: this comes often, at least once for each piece of it.
    ///
    /// # Errors
    /// The reason why no more may move.
    fn alive(&mut self) -> io::Result<()> {
        Ok(())
    }
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
    /// Call `keeper` before bytes of the target change.
    pub fn ask_before_change(&mut self, keeper: Rc<RefCell<dyn BeforeChange>>) {
        let alive = keeper.clone();
        // Nothing moves while it is asked.
        self.pace.tell_alive(Box::new(move || alive.try_borrow_mut().map_or(Ok(()), |mut alive| alive.alive())));
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
            let Some(device) = device.as_ref().filter(|device| device.role == DeviceRole::Target) else { continue };
            let of_it = requests.iter().filter(|request| request.device == number);
            let ranges: Vec<Range<u64>> = of_it.filter_map(changed).collect();
            if !ranges.is_empty() {
                keeper.borrow_mut().before(device, &ranges, &mut || pace.go_on())?;
            }
        }
        Ok(())
    }
}
