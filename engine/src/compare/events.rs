//! The messages of a comparison's guest: the host compares the bytes pair by pair and stops at the first difference.

use super::contents::{read, Contents, Extent, Location};
use super::Difference;
use crate::devices::{first_difference, Devices};
use crate::error::Error;
use crate::operation::{decode, Events, GuestFailure, Observer, Progress, Stage};
use crate::sandbox::BadRequest;
use instar_guest_abi::{ErrorCode, ExtentKind};
use instar_guest_protocol::compare::{Outcome, Pair, Pairs};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::rc::Rc;

/// Bytes that are read of each side at once.
const CHUNK: u64 = 1 << 20;
/// A difference is told by the sector that it is in, as `qemu-img compare` does.
const SECTOR: u64 = 512;

/// The state of a comparison.
pub struct CompareEvents {
    contents: Contents,
    sizes: [u64; 2],
    strict: bool,
    observer: Rc<dyn Observer>,
    /// Up to here the disks were compared.
    next: u64,
    buffers: [Vec<u8>; 2],
    /// Bytes that were read of each device for the pair at hand.
    read: BTreeMap<u32, u64>,
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
    pub(crate) fn new(contents: Contents, sizes: [u64; 2], strict: bool, observer: Rc<dyn Observer>) -> Self {
        let difference = (strict && sizes[0] != sizes[1]).then_some(Difference::Size);
        Self {
            contents,
            sizes,
            strict,
            observer,
            next: 0,
            buffers: Default::default(),
            read: BTreeMap::new(),
            difference,
            failure: None,
        }
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
        if self.observer.wants_progress() || self.observer.asks_for_progress() {
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
        (first, one): (u64, Extent),
        (second, two): (u64, Extent),
        done: u64,
    ) -> Result<(), Stop> {
        // A part may have begun before the range.
        let place = |offset: u64, part: Extent| {
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
                *self.read.entry(here.device).or_default() += length;
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

/// Make the difference after `equal` equal bytes of a run that begins at guest byte `start`.
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
            let compared = self.compare(devices, pair);
            // A small file can claim to be a huge disk, the same cluster again and again.
            for (device, bytes) in std::mem::take(&mut self.read) {
                devices.count_read(device, bytes);
            }
            match compared {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::devices::Device;
    use crate::map::{HoleMeaning, Place};
    use crate::operation::{Cancel, Handler};
    use crate::sandbox::Host;
    use instar_guest_protocol::compare::Side;
    use instar_guest_protocol::guest_message::Kind;
    use instar_guest_protocol::Message;
    use std::io::Write;

    const SIZE: u64 = 1 << 20;
    /// The byte that differs in the second file.
    const DIFFERS: u64 = 70_000;

    fn side(device: u32, offset: u64) -> Side {
        Side { depth: 0, kind: ExtentKind::Data as u32, device, offset }
    }

    fn pair() -> Pair {
        Pair { start: 0, length: SIZE, first: Some(side(0, 0)), second: Some(side(1, 0)), equal: 0 }
    }

    fn handler(strict: bool, sizes: [u64; 2]) -> Handler<CompareEvents> {
        let mut devices = Devices::new();
        for number in 0..2u32 {
            let mut file = tempfile::tempfile().unwrap();
            let mut content = vec![7; usize::try_from(SIZE).unwrap()];
            content[usize::try_from(DIFFERS).unwrap()] += u8::try_from(number).unwrap();
            file.write_all(&content).unwrap();
            devices.attach(number, Device::new(file, false, SIZE, SIZE, false));
        }
        let place = |depth| Place { depth, path: format!("file{depth}").into(), holes: HoleMeaning::Ignored };
        let contents = Contents::at(BTreeMap::from([(0, place(0)), (1, place(1))]), [1, 1]);
        Handler::new(devices, CompareEvents::new(contents, sizes, strict, Rc::new(())), Cancel::new())
    }

    /// Whether the guest goes on, and what was found to differ.
    fn told(pairs: &[Pair]) -> (bool, Option<Difference>) {
        let mut handler = handler(false, [SIZE, SIZE]);
        let goes_on = handler.message(Kind::Event(Pairs { pairs: pairs.to_vec() }.encode_to_vec())).is_ok();
        (goes_on && handler.events.end().is_ok(), handler.events.difference)
    }

    #[test]
    fn the_sector_that_differs_is_told() {
        assert_eq!(told(&[pair()]), (false, Some(Difference::Content(DIFFERS - DIFFERS % SECTOR))));
        let up_to = |length| Pair { length, ..pair() };
        assert_eq!(told(&[up_to(DIFFERS)]), (false, None), "not all of it");
        let zeroes = Side { kind: 0, ..side(0, 0) };
        let holes = Pair { first: Some(zeroes), second: Some(zeroes), ..pair() };
        assert_eq!(told(&[holes]), (true, None));
        assert_eq!(told(&[Pair { first: Some(zeroes), ..pair() }]), (false, Some(Difference::Content(0))));
    }

    #[test]
    fn what_only_the_guest_can_decode_it_compares() {
        let encoded = Side { kind: ExtentKind::Encoded as u32, ..side(0, 0) };
        let equal = |equal| told(&[Pair { first: Some(encoded), equal, ..pair() }]);
        assert_eq!(equal(SIZE), (true, None));
        assert_eq!(equal(1000), (false, Some(Difference::Content(512))));
        assert_eq!(equal(SIZE + 1), (false, None), "more than there is");
    }

    #[test]
    fn sizes_matter_where_they_are_asked_for() {
        let mut strict = handler(true, [SIZE, 2 * SIZE]);
        assert_eq!(strict.events.difference, Some(Difference::Size));
        assert!(strict.message(Kind::Event(Vec::new())).is_err());
        assert_eq!(handler(false, [SIZE, 2 * SIZE]).events.difference, None);
    }

    #[test]
    fn pairs_that_make_no_sense_end_the_guest() {
        let nonsense = |change: &dyn Fn(&mut Pair)| {
            let mut pair = pair();
            change(&mut pair);
            assert_eq!(told(&[pair]), (false, None), "{pair:?}");
        };
        nonsense(&|pair| pair.start = 1);
        nonsense(&|pair| pair.length = 0);
        nonsense(&|pair| pair.length = SIZE + 1);
        nonsense(&|pair| pair.length = u64::MAX);
        nonsense(&|pair| pair.first = None);
        nonsense(&|pair| pair.second = Some(side(0, 0)));
        nonsense(&|pair| pair.first = Some(side(9, 0)));
        nonsense(&|pair| pair.first = Some(Side { depth: 1, ..side(0, 0) }));
        nonsense(&|pair| pair.first = Some(side(0, u64::MAX)));
        nonsense(&|pair| pair.first = Some(Side { kind: 4, ..side(0, 0) }));
        nonsense(&|pair| pair.first = Some(Side { kind: 77, ..side(0, 0) }));
    }
}
