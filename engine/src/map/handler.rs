//! Serves the guest of a map: its block requests, its runs, its end.

use super::report::{Entry, Reporter};
use super::{Holes, Place};
use crate::commit::GuestFailure;
use crate::devices::Devices;
use crate::error::Error;
use crate::vm::{BadRequest, BufferAccess, Excess, GuestHandler, GuestLog};
use instar_guest_abi::{ErrorCode, ExtentKind, Request};
use instar_guest_protocol::guest_message::Kind;
use instar_guest_protocol::{MapResultMessage, MapRun};
use std::collections::BTreeMap;
use std::time::Duration;

/// What the guest of a map said.
pub struct MapHandler<'r, 'w> {
    devices: Devices,
    places: BTreeMap<u32, Place>,
    /// Virtual size of the top-most layer in bytes.
    size: u64,
    /// Up to here runs have come.
    next: u64,
    reporter: &'r mut Reporter<'w>,
    /// How the map ended, once the guest said so.
    pub result: Option<Result<(), GuestFailure>>,
    /// Log lines of the guest.
    pub log: GuestLog,
    /// Why a run could not be reported; the guest was ended then.
    pub unreported: Option<Error>,
}

impl<'r, 'w> MapHandler<'r, 'w> {
    pub fn new(devices: Devices, places: BTreeMap<u32, Place>, size: u64, reporter: &'r mut Reporter<'w>) -> Self {
        Self { devices, places, size, next: 0, reporter, result: None, log: GuestLog::default(), unreported: None }
    }

    /// All runs have come.
    ///
    /// # Errors
    /// If they have not; when the report cannot be written.
    pub fn end(self) -> Result<(), Error> {
        if self.next != self.size {
            let text = format!("the guest mapped {} bytes of a disk of {}", self.next, self.size);
            return Err(Error::new(ErrorCode::GuestProtocol, text));
        }
        self.reporter.end(&self.places)
    }

    /// Whether a run may come next.
    fn plausible(&self, run: &MapRun) -> bool {
        let layers = self.places.values().map(|place| place.depth).max().map_or(0, |deepest| deepest + 1);
        let end = run.start.checked_add(run.length);
        let placed = match ExtentKind::from_u32(run.kind) {
            Some(ExtentKind::Data) => {
                let place = self.places.get(&run.device);
                place.is_some_and(|place| place.depth == run.depth) && run.offset.checked_add(run.length).is_some()
            }
            Some(ExtentKind::Zero | ExtentKind::Encoded) => true,
            Some(ExtentKind::Memory) => false,
            None => run.kind == 0,
        };
        run.start == self.next
            && run.length != 0
            && end.is_some_and(|end| end <= self.size)
            && run.depth < layers
            && placed
    }

    /// Report a run, cut where the file has holes.
    fn take(&mut self, run: &MapRun) -> Result<(), BadRequest> {
        if !self.plausible(run) {
            return Err(BadRequest(format!("a run that makes no sense: {run:?}")));
        }
        self.next += run.length;
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
            Some(ExtentKind::Data) => self.data(run, &entry(kind)),
            // The disk itself is the file: it goes on past the end of it.
            Some(ExtentKind::Zero) if self.places.get(&run.depth).is_some_and(|p| p.holes == Holes::Absent) => {
                self.reporter.add(Entry { place: Some((run.depth, run.start)), ..entry(kind) }, &self.places)
            }
            _ => self.reporter.add(entry(kind), &self.places),
        };
        reported.map_err(|error| {
            let text = error.message.clone();
            self.unreported = Some(error);
            BadRequest(text)
        })
    }

    fn data(&mut self, run: &MapRun, whole: &Entry) -> Result<(), Error> {
        let holes = self.places.get(&run.device).map_or(Holes::Ignored, |place| place.holes);
        let end = run.offset + run.length;
        let mut at = run.offset;
        while at < end {
            let (data, hole) = match self.devices.device(run.device) {
                Some(device) if holes != Holes::Ignored => device.next_data(at, end),
                _ => (at, end),
            };
            for (from, to, zero) in [(at, data, true), (data, hole, false)] {
                if from < to {
                    let part = Entry {
                        start: run.start + (from - run.offset),
                        length: to - from,
                        zero,
                        data: !zero || holes != Holes::Absent,
                        place: Some((run.device, from)),
                        ..*whole
                    };
                    self.reporter.add(part, &self.places)?;
                }
            }
            at = hole.max(at + 1);
        }
        Ok(())
    }
}

impl GuestHandler for MapHandler<'_, '_> {
    fn requests(&mut self, memory: &dyn BufferAccess, requests: &mut [Request]) -> Result<(), BadRequest> {
        if self.result.is_some() {
            return Err(BadRequest("a request after the result".to_owned()));
        }
        self.devices.execute(memory, requests)
    }

    fn excess(&self, used: Duration) -> Option<Excess> {
        self.devices.excess(used)
    }

    fn message(&mut self, message: Kind) -> Result<(), BadRequest> {
        if self.result.is_some() {
            return Err(BadRequest("a message after the result".to_owned()));
        }
        match message {
            Kind::Map(map) => return map.runs.iter().try_for_each(|run| self.take(run)),
            Kind::MapResult(result) => self.result = Some(outcome(&result)),
            Kind::Log(line) => self.log.take(line),
            _ => return Err(BadRequest("a message that a map does not send".to_owned())),
        }
        Ok(())
    }
}

fn outcome(message: &MapResultMessage) -> Result<(), GuestFailure> {
    if message.error == 0 {
        return Ok(());
    }
    let place = (message.error_device, message.error_offset);
    Err(GuestFailure::reported(message.error, place, message.error_errno, &message.error_text))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::report::Format;
    use super::*;
    use instar_guest_protocol::MapMessage;

    const SIZE: u64 = 1 << 20;

    /// What a map of two layers prints, and whether the guest was ended.
    fn printed(runs: &[MapRun]) -> (String, bool) {
        let place = |depth, holes| Place { depth, path: format!("layer{depth}").into(), holes };
        let places = BTreeMap::from([(0, place(0, Holes::Ignored)), (1, place(1, Holes::Ignored))]);
        let mut out = Vec::new();
        let mut reporter = Reporter::new(&mut out, Format::Json, 0..u64::MAX);
        let mut handler = MapHandler::new(Devices::default(), places, SIZE, &mut reporter);
        let taken = handler.message(Kind::Map(MapMessage { runs: runs.to_vec() })).is_ok() && handler.end().is_ok();
        drop(reporter);
        (String::from_utf8(out).unwrap(), taken)
    }

    fn run(start: u64, length: u64, depth: u32, kind: u32) -> MapRun {
        MapRun { start, length, depth, kind, device: depth, offset: 7 * SIZE }
    }

    #[test]
    fn runs_become_lines() {
        let (text, taken) = printed(&[run(0, 4096, 1, 1), run(4096, 4096, 0, 3), run(8192, SIZE - 8192, 1, 0)]);
        assert!(taken);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("[{ \"start\": 0,") && lines[0].ends_with("\"offset\": 7340032},"), "{text}");
        assert!(lines[1].contains("\"compressed\": true}"), "{text}");
        assert!(
            lines[2].contains("\"depth\": 1, \"present\": false, \"zero\": true") && lines[2].ends_with("}]"),
            "{text}"
        );
    }

    #[test]
    fn runs_that_make_no_sense_end_the_guest() {
        let all = |change: &dyn Fn(&mut MapRun)| {
            let mut whole = run(0, SIZE, 0, 1);
            change(&mut whole);
            printed(&[whole]).1
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
        assert!(!printed(&[run(0, SIZE, 0, 1), run(0, SIZE, 0, 1)]).1, "twice");
    }
}
