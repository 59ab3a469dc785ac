//! Runs of a map: merged where one goes on as the last did, and cut to the bytes of interest.

use super::places::Place;
use crate::error::Error;
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// A run of the virtual disk, as it is reported. What is serialized has the keys of `qemu-img map --output=json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MapRun<'p> {
    /// Guest offset in bytes.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// The layer; 0 is the top-most.
    pub depth: u32,
    /// That layer holds it.
    pub present: bool,
    /// It reads as zeroes.
    pub zero: bool,
    /// It takes space.
    pub data: bool,
    /// It is compressed.
    pub compressed: bool,
    /// The byte offset in `file`, if the run has a place of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The file that it is in, if it has a place of its own.
    #[serde(skip)]
    pub file: Option<&'p Path>,
    /// The first file of its layer.
    #[serde(skip)]
    pub layer: &'p Path,
}

/// Takes runs.
pub type Each<'e> = dyn FnMut(&MapRun<'_>) -> Result<(), Error> + 'e;

/// A run as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest offset in bytes.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// The layer; 0 is the top-most.
    pub depth: u32,
    /// That layer holds it.
    pub present: bool,
    /// It reads as zeroes.
    pub zero: bool,
    /// It takes space.
    pub data: bool,
    /// It is compressed.
    pub compressed: bool,
    /// The device and the byte offset on it, if it has a place of its own.
    pub place: Option<(u32, u64)>,
}

impl Entry {
    /// Whether `next` is more of the same.
    fn goes_on(&self, next: &Self) -> bool {
        let same = |entry: &Self| (entry.depth, entry.present, entry.zero, entry.data, entry.compressed);
        let places = match (self.place, next.place) {
            (None, None) => true,
            (Some((device, offset)), Some((other, after))) => {
                device == other && offset.checked_add(self.length) == Some(after)
            }
            _ => false,
        };
        same(self) == same(next) && self.start.checked_add(self.length) == Some(next.start) && places
    }

    /// What of it lies in `range`.
    fn within(&self, range: &Range<u64>) -> Option<Self> {
        let start = self.start.max(range.start);
        let end = self.start.saturating_add(self.length).min(range.end);
        let skipped = start - self.start;
        let place = self.place.map(|(device, offset)| (device, offset.saturating_add(skipped)));
        (start < end).then(|| Self { start, length: end - start, place, ..*self })
    }
}

/// Merges entries as they come, and reports them.
pub struct Runs<'e> {
    each: Option<Box<Each<'e>>>,
    /// The files that places are in.
    places: BTreeMap<u32, Place>,
    /// The guest bytes of interest.
    range: Range<u64>,
    last: Option<Entry>,
}

impl<'e> Runs<'e> {
    /// Runs within `range` of images in these files.
    #[must_use]
    pub fn new(range: Range<u64>, places: BTreeMap<u32, Place>, each: Option<Box<Each<'e>>>) -> Self {
        Self { each, places, range, last: None }
    }

    /// The files that places are in.
    #[must_use]
    pub fn places(&self) -> &BTreeMap<u32, Place> {
        &self.places
    }

    /// Take the next entry.
    ///
    /// # Errors
    /// Those of the receiver of the runs.
    pub fn add(&mut self, entry: Entry) -> Result<(), Error> {
        let Some(entry) = entry.within(&self.range) else { return Ok(()) };
        match &mut self.last {
            Some(last) if last.goes_on(&entry) => {
                last.length += entry.length;
                Ok(())
            }
            last => match last.replace(entry) {
                Some(before) => self.report(&before),
                None => Ok(()),
            },
        }
    }

    /// The last entry has come.
    ///
    /// # Errors
    /// Those of the receiver of the runs.
    pub fn end(&mut self) -> Result<(), Error> {
        self.last.take().map_or(Ok(()), |last| self.report(&last))
    }

    fn report(&mut self, entry: &Entry) -> Result<(), Error> {
        let Entry { start, length, depth, present, zero, data, compressed, place } = *entry;
        let path = |device: &u32| self.places.get(device).map(|place| place.path.as_path());
        let run = MapRun {
            start,
            length,
            depth,
            present,
            zero,
            data,
            compressed,
            offset: place.map(|(_, offset)| offset),
            file: place.and_then(|(device, _)| path(&device)),
            layer: path(&depth).unwrap_or(Path::new("")),
        };
        self.each.as_mut().map_or(Ok(()), |each| each(&run))
    }
}
