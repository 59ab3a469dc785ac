//! What a comparison makes of what its guest says: the bytes are compared pair by pair, and the first difference is the end.

use super::contents::{read, Contents, Location, Part};
use super::Difference;
use crate::devices::Devices;
use crate::error::Error;
use crate::operation::{decode, Events, GuestFailure, Observer, Progress, Stage};
use crate::sandbox::BadRequest;
use instar_guest_abi::{ErrorCode, ExtentKind};
use instar_guest_protocol::compare::{Outcome, Pair, Pairs};
use std::io;
use std::ops::Range;
use std::rc::Rc;

/// Bytes that are read of each side at once.
const CHUNK: u64 = 1 << 20;
/// A difference is told by the sector that it is in, as `qemu-img compare` does.
const SECTOR: u64 = 512;

/// What the guest of a comparison said, and what came of it.
pub struct CompareEvents {
    contents: Contents,
    sizes: [u64; 2],
    strict: bool,
    observer: Rc<dyn Observer>,
    /// Up to here the disks were compared.
    next: u64,
    buffers: [Vec<u8>; 2],
    /// The first difference; the guest was ended then.
    pub difference: Option<Difference>,
    /// Why a file could not be read; the guest was ended then.
    pub failure: Option<GuestFailure>,
}

/// Why the guest is ended before it has said everything.
enum Stop {
    Differs(Difference),
    Unreadable(GuestFailure),
}

impl CompareEvents {
    /// Those of a comparison of two disks of these sizes in bytes.
    #[must_use]
    pub(super) fn new(contents: Contents, sizes: [u64; 2], strict: bool, observer: Rc<dyn Observer>) -> Self {
        let difference = (strict && sizes[0] != sizes[1]).then_some(Difference::Size);
        Self { contents, sizes, strict, observer, next: 0, buffers: Default::default(), difference, failure: None }
    }

    /// Bytes of the longer disk.
    fn total(&self) -> u64 {
        self.sizes[0].max(self.sizes[1])
    }

    /// All pairs have come.
    ///
    /// # Errors
    /// If they have not.
    pub fn end(&self) -> Result<(), Error> {
        if self.next == self.total() {
            return Ok(());
        }
        let text = format!("the guest compared {} bytes of disks of {}", self.next, self.total());
        Err(Error::new(ErrorCode::GuestProtocol, text))
    }

    fn show(&self, done: u64) {
        if self.observer.wants_progress() {
            self.observer.progress(Progress { stage: Stage::Reading, done, total: self.total() });
        }
    }

    fn is_plausible(&self, pair: &Pair) -> bool {
        let end = pair.start.checked_add(pair.length).filter(|&end| end <= self.total());
        let side = |view, side: &Option<_>| {
            side.as_ref().is_some_and(|side| self.contents.is_plausible(view, side, pair.length))
        };
        pair.start == self.next
            && pair.length != 0
            && end.is_some()
            && pair.equal <= pair.length
            && side(0, &pair.first)
            && side(1, &pair.second)
    }

    /// Compare what two disks have.
    fn compare(&mut self, devices: &Devices, pair: &Pair) -> Result<(), Stop> {
        let (Some(first), Some(second)) = (&pair.first, &pair.second) else { return Ok(()) };
        let encoded = [first, second].into_iter().any(|side| side.kind == ExtentKind::Encoded as u32);
        let mut sides = [first, second].map(|side| self.contents.parts(devices, side, pair.length).peekable());
        let mut done = 0;
        while done < pair.length {
            let parts = sides.each_mut().map(|side| {
                while side.next_if(|part| part.end <= done).is_some() {}
                side.peek().copied()
            });
            let [Some(one), Some(two)] = parts else { break };
            let end = one.end.min(two.end);
            let at = pair.start + done;
            if self.strict && one.allocation != two.allocation {
                return Err(Stop::Differs(Difference::Allocation(at)));
            }
            if !encoded {
                self.compare_parts(devices, at..pair.start + end, (first.offset, one), (second.offset, two), done)?;
            }
            done = end;
            self.show(pair.start + done);
        }
        if encoded && pair.equal < pair.length {
            return Err(Stop::Differs(content(pair.start, pair.equal)));
        }
        Ok(())
    }

    /// Compare the bytes of a range that is plain, or zeroes, on both sides.
    fn compare_parts(
        &mut self,
        devices: &Devices,
        range: Range<u64>,
        (first, one): (u64, Part),
        (second, two): (u64, Part),
        done: u64,
    ) -> Result<(), Stop> {
        // A part may have begun before the range.
        let place = |offset: u64, part: Part| {
            part.location.map(|location| Location { offset: offset.saturating_add(done), ..location })
        };
        let places = [place(first, one), place(second, two)];
        match places {
            [None, None] => return Ok(()),
            [Some(one), Some(two)] if self.contents.are_same(one, two) => return Ok(()),
            _ => {}
        }
        let mut at = range.start;
        while at < range.end {
            let length = CHUNK.min(range.end - at);
            for (place, buffer) in places.into_iter().zip(&mut self.buffers) {
                let Some(place) = place else { continue };
                buffer.resize(usize::try_from(length).unwrap_or(0), 0);
                let here = Location { offset: place.offset.saturating_add(at - range.start), ..place };
                read(devices, here, buffer).map_err(|error| unreadable(here, &error))?;
            }
            let [one, two] = &self.buffers;
            let differs = match places {
                [Some(_), Some(_)] => first_difference(one, two),
                [Some(_), None] => one.iter().position(|&byte| byte != 0),
                _ => two.iter().position(|&byte| byte != 0),
            };
            if let Some(differs) = differs {
                return Err(Stop::Differs(content(range.start, at - range.start + differs as u64)));
            }
            at += length;
            self.show(at);
        }
        Ok(())
    }
}

fn unreadable(Location { device, offset }: Location, error: &io::Error) -> Stop {
    let errno = error.raw_os_error().and_then(|errno| u32::try_from(errno).ok()).unwrap_or(0);
    let failure = GuestFailure::ended(ErrorCode::OverlayIo, "read failed");
    Stop::Unreadable(GuestFailure { device: Some(device), offset: Some(offset), errno, ..failure })
}

fn first_difference(one: &[u8], two: &[u8]) -> Option<usize> {
    // Comparing slices is much faster than comparing bytes.
    (one != two).then(|| one.iter().zip(two).position(|(one, two)| one != two)).flatten()
}

/// The content differs so many bytes behind `start`, in a run that begins there.
fn content(start: u64, equal: u64) -> Difference {
    let at = start + equal;
    Difference::Content((at - at % SECTOR).max(start))
}

impl Events for CompareEvents {
    fn event(&mut self, devices: &mut Devices, event: &[u8]) -> Result<(), BadRequest> {
        if self.difference.is_some() {
            return Err(BadRequest("the disks have different sizes".to_owned()));
        }
        let Pairs { pairs } = decode(event)?;
        for pair in &pairs {
            if !self.is_plausible(pair) {
                return Err(BadRequest(format!("a pair that makes no sense: {pair:?}")));
            }
            self.next += pair.length;
            match self.compare(devices, pair) {
                Ok(()) => {}
                Err(Stop::Differs(difference)) => {
                    self.difference = Some(difference);
                    return Err(BadRequest("the disks differ".to_owned()));
                }
                Err(Stop::Unreadable(failure)) => {
                    self.failure = Some(failure);
                    return Err(BadRequest("a file cannot be read".to_owned()));
                }
            }
        }
        Ok(())
    }

    fn succeeded(&mut self, _: &mut Devices, result: &[u8]) -> Result<(), BadRequest> {
        decode(result).map(|Outcome {}| ())
    }
}
