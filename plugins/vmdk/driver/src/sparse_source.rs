//! What a sparse extent holds, and how it is emptied. Guest offsets are those of the extent.

use crate::decode::GrainReader;
use crate::image::{Directory, Image};
use crate::tables::Table;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_sdk::abi::Request;
use instar_guest_sdk::table::Used;
use instar_guest_sdk::{overflow, Batch, BlockIo, Content, DriverResult, Extent, Extents};
use instar_vmdk_format::{CowdHeader, Grain, Layout, Place, SECTOR};

/// Bytes of tables that are read ahead while enumerating.
const AHEAD_BYTES: u64 = 512 << 10;
/// At most this many grains are decoded before anything is changed, and no more bytes than these. Of an image with more of
/// them, one that does not decode is found while it is committed: the overlay is intact then, the backing has changed.
const DECODED_GRAINS: usize = 1024;
const DECODED_BYTES: u64 = 256 << 20;
/// Pieces of metadata besides tables.
const FIXED: usize = 5;
/// Requests that are submitted at once while emptying.
const BATCH: usize = 4096;

/// A sparse extent that data comes from.
#[derive(Debug)]
pub struct SparseSource {
    pub(crate) image: Image,
    reader: GrainReader,
    held: u64,
    /// Tables that were read last, with indices that follow each other.
    ahead: Vec<Table>,
    /// For each directory: the tables that hold anything.
    used: Vec<Used>,
}

impl SparseSource {
    pub(crate) fn new(image: Image) -> Self {
        Self { image, reader: GrainReader::default(), held: 0, ahead: Vec::new(), used: Vec::new() }
    }

    /// The extent of a grain, cut at the end of the disk.
    fn extent(&self, guest: u64, grain: Grain) -> DriverResult<Option<Extent>> {
        let length = self.image.layout.grain_bytes().min(self.image.layout.virtual_size() - guest);
        let content = match grain {
            Grain::Absent => return Ok(None),
            Grain::Zero => Content::Zero,
            Grain::At(offset) if offset >= self.image.file_length => {
                let text = alloc::format!("the grain of guest offset {guest} lies past the end of the file");
                return Err(self.image.corrupt(offset, text));
            }
            Grain::At(offset) if self.image.layout.compressed => Content::Encoded { location: offset },
            Grain::At(offset) => Content::Data { device: self.image.device, offset },
        };
        Ok(Some(Extent { guest_offset: guest, length, content }))
    }

    /// Where the file may be cut or punched once it holds no grains: `gap` is called for each gap between metadata, from
    /// `overHead` on, ascending. Returns the length that is left.
    fn garbage(&self, gap: &mut dyn FnMut(Range<u64>) -> DriverResult<()>) -> DriverResult<u64> {
        // Half a million tables are possible: 8 MiB.
        let sectors = self.image.layout.table_bytes() / SECTOR;
        let tables = self.image.directories().flat_map(|directory| &directory.entries).filter(|&&sector| sector != 0);
        let tables = tables.map(|&sector| u64::from(sector)..u64::from(sector) + sectors);
        let mut used: Vec<Range<u64>> = Vec::with_capacity(tables.clone().count() + FIXED);
        used.extend(tables.chain(self.image.fixed_metadata().into_iter().map(|(sectors, _)| sectors)));
        used.sort_unstable_by_key(|sectors| sectors.start);
        let mut at = self.image.layout.overhead.saturating_mul(SECTOR);
        for sectors in used {
            let range = sectors.start.saturating_mul(SECTOR)..sectors.end.saturating_mul(SECTOR);
            if range.start > at {
                gap(at..range.start)?;
            }
            at = at.max(range.end);
        }
        Ok(at.min(self.image.file_length))
    }

    /// Give the space in the gaps back.
    fn punch(&self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let mut requests = Batch::new();
        self.garbage(&mut |gap| {
            requests.push(Request::discard(self.image.device, gap.start, gap.end - gap.start));
            if requests.len() >= BATCH {
                requests.submit(io)?;
            }
            Ok(())
        })?;
        requests.submit(io)
    }

    /// The tables that hold anything, each with its directory.
    fn holding(&self) -> impl Iterator<Item = (&Directory, usize)> {
        self.image.directories().zip(&self.used).flat_map(|(directory, used)| {
            directory.present().filter(|&index| used.contains(index as u64)).map(move |index| (directory, index))
        })
    }

    /// Make every entry 0, in both copies, and that durable. The second copies go first: a crash leaves them out of date, which
    /// they are after an interrupted commit as well, and no first copy that lacks what the second one names.
    fn drop_grains(&self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let length = self.image.layout.table_bytes();
        let zeroes = vec![0u8; usize::try_from(length).map_err(|_| overflow("a grain table"))?];
        let mut requests = Batch::new();
        for is_first in [false, true] {
            let holding = self.holding();
            for (directory, index) in
                holding.filter(|(of, _)| core::ptr::eq(*of, &raw const self.image.directory) == is_first)
            {
                if let Some(offset) = self.image.table_offset(directory, index)? {
                    requests.push(Request::write(self.image.device, offset, zeroes.as_ptr() as u64, length));
                }
                if requests.len() >= BATCH {
                    requests.submit(io)?;
                }
            }
            if is_first || self.image.redundant.is_some() {
                requests.push(Request::flush(self.image.device));
            }
            requests.submit(io)?;
        }
        Ok(())
    }
}

impl SparseSource {
    /// See [`Source::verify`](instar_guest_sdk::Source::verify).
    pub fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        self.held = self.image.verify(io)?.grains;
        self.decode_all(io)?;
        if will_empty && self.image.layout.next_free.is_none() {
            let used = self.image.directories().map(|directory| self.image.used_tables(io, directory));
            self.used = used.collect::<DriverResult<_>>()?;
        }
        Ok(self.held)
    }

    /// Decode compressed grains, unless they are too many; the bytes are dropped. One that does not decode would be found
    /// while the backing is written.
    fn decode_all(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let grain = self.image.layout.grain_bytes();
        let most = usize::try_from(DECODED_BYTES / grain.max(1)).unwrap_or(0).min(DECODED_GRAINS);
        if !self.image.layout.compressed || self.held > most as u64 {
            return Ok(());
        }
        let mut extents = Extents::with_room_for(most + 1);
        self.extents(io, 0..self.image.layout.virtual_size(), &mut extents)?;
        let mut buffer = vec![0; usize::try_from(grain).map_err(|_| overflow("the grain size"))?];
        for extent in extents.iter().filter(|extent| extent.is_encoded()) {
            let length = usize::try_from(extent.length).map_err(|_| overflow("a grain"))?.min(buffer.len());
            self.read(io, extent, extent.guest_offset, buffer.get_mut(..length).unwrap_or_default())?;
        }
        Ok(())
    }

    /// See [`Source::extents`](instar_guest_sdk::Source::extents).
    pub fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let size = self.image.layout.virtual_size();
        let limit = range.end.min(size);
        let Place { mut table, mut entry, grain: mut guest } = self.image.layout.place(range.start);
        self.reader.enumerate(guest);
        while guest < limit {
            self.load_tables(io, table, limit)?;
            for loaded in self.ahead.iter().skip_while(|loaded| loaded.index < table) {
                if !loaded.holds_anything() {
                    (guest, entry) = (self.image.layout.guest_of(loaded.index + 1, 0), 0);
                    continue;
                }
                for &value in loaded.entries.get(entry..).unwrap_or_default() {
                    if guest >= limit {
                        return Ok(guest.min(size));
                    }
                    let held = self.extent(guest, self.image.layout.grain_of(value))?;
                    if let Some(Extent { content: Content::Encoded { location }, .. }) = held {
                        self.reader.note(&self.image, guest, location);
                    }
                    if held.is_some_and(|extent| !out.push(extent)) {
                        return Ok(guest);
                    }
                    guest += self.image.layout.grain_bytes();
                }
                entry = 0;
            }
            table = self.ahead.last().map_or(table, |last| last.index) + 1;
            guest = self.image.layout.guest_of(table, 0);
        }
        Ok(guest.min(size))
    }

    /// Give back the memory of the tables that were read last.
    pub fn forget_tables(&mut self) {
        self.ahead = Vec::new();
    }

    /// Make table `first` the one that is held, with those that follow it up to guest byte `limit`: a gap that is filled
    /// after another one mostly has its entries in the same table.
    fn load_tables(&mut self, io: &mut dyn BlockIo, first: usize, limit: u64) -> DriverResult<()> {
        if self.ahead.iter().any(|held| held.index == first) {
            return Ok(());
        }
        let last = usize::try_from(limit.div_ceil(self.image.layout.table_coverage())).unwrap_or(usize::MAX);
        let tables = usize::try_from(AHEAD_BYTES / self.image.layout.table_bytes()).unwrap_or(1);
        let end = self.image.directory.entries.len().min(last).min(first.saturating_add(tables));
        let indices: Vec<usize> = (first..end.max(first + 1)).collect();
        self.ahead = self.image.read_tables(io, &self.image.directory, &indices)?;
        Ok(())
    }

    /// See [`Source::read`](instar_guest_sdk::Source::read).
    pub fn read(
        &mut self,
        io: &mut dyn BlockIo,
        extent: &Extent,
        guest_offset: u64,
        buffer: &mut [u8],
    ) -> DriverResult<()> {
        let start = guest_offset.checked_sub(extent.guest_offset).ok_or_else(|| overflow("an offset in a grain"))?;
        let Content::Encoded { location } = extent.content else { return Err(overflow("an encoded extent")) };
        self.reader.read(io, &self.image, (extent.guest_offset, location), start, buffer)
    }

    /// First the entries, in both copies: from then on everything is read from the backing. A crash before or within
    /// that leaves some grains, which read the same. Then, with that durable, the space is given back.
    ///
    /// Tables stay where they are: QEMU does not write to a disk whose directory has none for a place.
    pub fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.forget_tables();
        if let Some(free) = self.image.layout.next_free {
            return self.empty_cowd(io, free);
        }
        let length = self.garbage(&mut |_| Ok(()))?;
        // What an interrupted commit left to do is done, too.
        let held = self.holding().next().is_some();
        if !held && length >= self.image.file_length {
            return Ok(0);
        }
        if held {
            self.drop_grains(io)?;
            self.used.clear();
        }
        let device = self.image.device;
        self.punch(io)?;
        let mut requests = Vec::new();
        if length < self.image.file_length {
            requests.push(Request::set_length(device, length));
            self.image.file_length = length;
        }
        requests.push(Request::flush(device));
        io.run(&mut requests)?;
        Ok(core::mem::take(&mut self.held))
    }

    /// An extent of ESX becomes what it is when a snapshot is taken: a directory without tables. First the directory, part of
    /// which a crash may leave: what it still names reads as the backing does. With that durable, the first free sector, which
    /// a crash leaves too high, and nothing is lost by that; last the length, because the number has to be less.
    fn empty_cowd(&mut self, io: &mut dyn BlockIo, free: u64) -> DriverResult<u64> {
        let Layout { directory, directory_sectors, overhead, .. } = self.image.layout;
        let device = self.image.device;
        let shortest = overhead.checked_mul(SECTOR).and_then(Layout::length_beyond);
        let length = shortest.ok_or_else(|| overflow("the length of the file"))?.min(self.image.file_length);
        let tables = self.image.directory.present().next().is_some();
        // What an interrupted commit left to do is done, too.
        if tables {
            let (offset, bytes) = (directory.saturating_mul(SECTOR), directory_sectors.saturating_mul(SECTOR));
            io.run(&mut [Request::zero(device, offset, bytes), Request::flush(device)])?;
            self.image.directory.entries.fill(0);
        }
        if free != overhead {
            let number = u32::try_from(overhead).map_err(|_| overflow("the first free sector"))?;
            let (place, bytes) = CowdHeader::free_sector(number);
            io.write(device, place.start as u64, &bytes)?;
            io.flush(device)?;
            self.image.layout.next_free = Some(overhead);
        }
        if length < self.image.file_length {
            io.run(&mut [Request::set_length(device, length), Request::flush(device)])?;
            self.image.file_length = length;
        }
        Ok(core::mem::take(&mut self.held))
    }
}
