//! The messages of a map's guest: runs, and the end.

use super::places::{cut_at_holes, is_plausible, HoleMeaning};
use super::runs::{Entry, Runs};
use crate::devices::Devices;
use crate::error::Error;
use crate::operation::{decode, Ended, Events};
use crate::sandbox::BadRequest;
use instar_guest_abi::{ErrorCode, ExtentKind};
use instar_guest_protocol::map::{Outcome, Run as GuestRun, Runs as GuestRuns};

/// The state of a map.
pub struct MapEvents<'e> {
    /// Virtual size of the top-most layer in bytes.
    size: u64,
    /// Up to here runs have come.
    next: u64,
    /// How many layers the chain has.
    layers: u32,
    /// How many runs may still come.
    room: u64,
    runs: Runs<'e>,
    /// Why a run could not be reported; the guest was ended then.
    unreported: Option<Error>,
}

impl<'e> MapEvents<'e> {
    /// Those of a map of a disk of `size` bytes, which has `most` runs at most.
    #[must_use]
    pub fn new(size: u64, most: u64, runs: Runs<'e>) -> Self {
        let layers = runs.places().values().map(|place| place.depth + 1).max().unwrap_or(0);
        Self { size, next: 0, layers, room: most, runs, unreported: None }
    }

    /// Turn the end of a mapping guest into the operation's result.
    ///
    /// # Errors
    /// Why a run could not be reported, or why the guest was ended; as [`MapEvents::end`].
    pub fn conclude(mut ended: Ended<Self>) -> Result<(), Error> {
        if let Some(error) = ended.events.unreported.take() {
            return Err(error);
        }
        ended.end.map_err(|failure| failure.error(&ended.paths, None))?;
        ended.events.end()
    }

    /// All runs have come.
    ///
    /// # Errors
    /// If they have not; when the last run cannot be reported.
    pub fn end(&mut self) -> Result<(), Error> {
        if self.next != self.size {
            let text = format!("the guest mapped {} bytes of a disk of {}", self.next, self.size);
            return Err(Error::new(ErrorCode::GuestProtocol, text));
        }
        self.runs.end()
    }

    /// Whether a run may come next.
    fn plausible(&self, run: &GuestRun) -> bool {
        let end = run.start.checked_add(run.length);
        run.start == self.next
            && run.length != 0
            && end.is_some_and(|end| end <= self.size)
            && run.depth < self.layers
            && is_plausible(self.runs.places(), run.depth, run.kind, (run.device, run.offset), run.length)
    }

    /// Report a run, cut where the file has holes.
    fn take(&mut self, devices: &Devices, run: &GuestRun) -> Result<(), BadRequest> {
        if !self.plausible(run) {
            return Err(BadRequest(format!("a run that makes no sense: {run:?}")));
        }
        self.next += run.length;
        let Some(room) = self.room.checked_sub(1) else { return Err(self.out_of_proportion()) };
        self.room = room;
        let entry = |kind: Option<ExtentKind>| Entry {
            start: run.start,
            length: run.length,
            depth: run.depth,
            present: kind.is_some(),
            zero: matches!(kind, None | Some(ExtentKind::Zero)),
            data: matches!(kind, Some(ExtentKind::Data | ExtentKind::Encoded)),
            compressed: kind == Some(ExtentKind::Encoded),
            place: None,
        };
        let kind = ExtentKind::from_u32(run.kind);
        let reported = match kind {
            Some(ExtentKind::Data) => self.data(devices, run, &entry(kind)),
            // The disk itself is the file: it goes on past the end of it.
            Some(ExtentKind::Zero)
                if self.runs.places().get(&run.depth).is_some_and(|p| p.holes == HoleMeaning::Absent) =>
            {
                self.runs.add(Entry { place: Some((run.depth, run.start)), ..entry(kind) })
            }
            _ => self.runs.add(entry(kind)),
        };
        reported.map_err(|error| {
            let text = error.message.clone();
            self.unreported = Some(error);
            BadRequest(text)
        })
    }

    /// Tables that are used again and again map more than all entries of the files could.
    fn out_of_proportion(&mut self) -> BadRequest {
        let clause =
            "its tables map the same parts of the file again and again, in more runs than a file of its length can \
                      name: restore a copy, and keep this image away from tools without a sandbox";
        let path = self.runs.places().get(&0).map(|place| place.path.clone()).unwrap_or_default();
        self.unreported = Some(Error::image(&path, ErrorCode::LimitExceeded, clause));
        BadRequest("more runs than the files can name".to_owned())
    }

    fn data(&mut self, devices: &Devices, run: &GuestRun, whole: &Entry) -> Result<(), Error> {
        let holes = self.runs.places().get(&run.device).map_or(HoleMeaning::Ignored, |place| place.holes);
        for (part, zero) in cut_at_holes(devices, run.device, holes, run.offset..run.offset + run.length) {
            self.runs.add(Entry {
                start: run.start + (part.start - run.offset),
                length: part.end - part.start,
                zero,
                data: !zero || holes != HoleMeaning::Absent,
                place: Some((run.device, part.start)),
                ..*whole
            })?;
        }
        Ok(())
    }
}

impl Events for MapEvents<'_> {
    fn event(&mut self, devices: &mut Devices, event: &[u8]) -> Result<(), BadRequest> {
        let GuestRuns { runs } = decode(event)?;
        runs.iter().try_for_each(|run| self.take(devices, run))
    }

    fn succeeded(&mut self, _: &mut Devices, result: &[u8]) -> Result<(), BadRequest> {
        decode(result).map(|Outcome {}| ())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{HoleMeaning, MapRun, Place};
    use super::*;
    use crate::operation::{Cancel, Handler};
    use crate::sandbox::Host;
    use instar_guest_protocol::guest_message::Kind;
    use instar_guest_protocol::Message;
    use std::collections::BTreeMap;

    const SIZE: u64 = 1 << 20;
    const MOST: u64 = 5;

    /// The runs of a map of two layers as JSON, and whether the guest was let through to its end.
    fn mapped(runs: &[GuestRun]) -> (Vec<String>, bool) {
        let place = |depth, holes| Place { depth, path: format!("layer{depth}").into(), holes };
        let places = BTreeMap::from([(0, place(0, HoleMeaning::Ignored)), (1, place(1, HoleMeaning::Ignored))]);
        let mut lines = Vec::new();
        let mut each = |run: &MapRun<'_>| {
            lines.push(serde_json::to_string(run).unwrap());
            Ok(())
        };
        let events = MapEvents::new(SIZE, MOST, Runs::new(0..u64::MAX, places, Some(Box::new(&mut each))));
        let mut handler = Handler::new(Devices::new(), events, Cancel::new());
        let message = Kind::Event(GuestRuns { runs: runs.to_vec() }.encode_to_vec());
        let taken = handler.message(message).is_ok() && handler.events.end().is_ok();
        drop(handler);
        (lines, taken)
    }

    fn run(start: u64, length: u64, depth: u32, kind: u32) -> GuestRun {
        GuestRun { start, length, depth, kind, device: depth, offset: 7 * SIZE }
    }

    #[test]
    fn runs_become_lines() {
        let (lines, taken) = mapped(&[run(0, 4096, 1, 1), run(4096, 4096, 0, 3), run(8192, SIZE - 8192, 1, 0)]);
        assert!(taken);
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("{\"start\":0,") && lines[0].ends_with("\"offset\":7340032}"), "{lines:?}");
        assert!(lines[1].ends_with("\"compressed\":true}"), "{lines:?}");
        assert!(lines[2].contains("\"depth\":1,\"present\":false,\"zero\":true"), "{lines:?}");
    }

    #[test]
    fn runs_that_make_no_sense_end_the_guest() {
        let all = |change: &dyn Fn(&mut GuestRun)| {
            let mut whole = run(0, SIZE, 0, 1);
            change(&mut whole);
            mapped(&[whole]).1
        };
        assert!(all(&|_| {}));
        assert!(!all(&|run| run.start = 1), "a gap");
        assert!(!all(&|run| run.length = 0), "nothing");
        assert!(!all(&|run| run.length = SIZE + 1), "past the end");
        assert!(!all(&|run| run.length = u64::MAX), "overflow");
        assert!(!all(&|run| run.length = SIZE - 1), "too little");
        assert!(!all(&|run| run.depth = 2), "no such layer");
        assert!(!all(&|run| run.device = 1), "a file of another layer");
        assert!(!all(&|run| run.device = 9), "no such file");
        assert!(!all(&|run| run.offset = u64::MAX), "no such place");
        assert!(!all(&|run| run.kind = 4), "guest memory");
        assert!(!all(&|run| run.kind = 77), "no such kind");
        assert!(!mapped(&[run(0, SIZE, 0, 1), run(0, SIZE, 0, 1)]).1, "twice");
        let pieces = |count: u64| {
            let length = |at| if at + 1 == count { SIZE - 512 * at } else { 512 };
            (0..count).map(|at| run(512 * at, length(at), 0, 3)).collect::<Vec<_>>()
        };
        assert!(mapped(&pieces(MOST)).1 && !mapped(&pieces(MOST + 1)).1, "more than the files can name");
    }
}
