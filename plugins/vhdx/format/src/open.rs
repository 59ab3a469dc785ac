//! Opening an image: from the file type identifier to what the metadata says, through the log.

use crate::metadata::Metadata;
use crate::{
    active_sequence, ids, FormatError, Headers, Layout, Lineage, LoadError, Locator, Read, Region, RegionTable, Replay,
    HEADER_BYTES, HEADER_OFFSETS, REGION_TABLE_BYTES, REGION_TABLE_OFFSETS, SIGNATURE,
};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Longest log that is replayed, in bytes: it is read whole. Programs make logs of 1 MiB.
pub const MAX_REPLAYED_LOG: u32 = 4 << 20;

/// What an image says of itself. All of it is seen through the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The headers.
    pub headers: Headers,
    /// What the log still has to do; `None` if it is empty.
    pub replay: Option<Replay>,
    /// Length of the file in bytes once the log is replayed.
    pub file_length: u64,
    /// The regions.
    pub regions: RegionTable,
    /// That of the block allocation table.
    pub bat: Region,
    /// That of the metadata.
    pub metadata_region: Region,
    /// The metadata.
    pub metadata: Metadata,
    /// The parent locator, of an image with a parent.
    pub locator: Option<Locator>,
}

impl Opened {
    /// Open an image of `file_length` bytes. At most 6 MiB are read, the log included.
    ///
    /// # Errors
    /// For what the image says, and those of `read`.
    pub fn load<E>(file_length: u64, read: Read<'_, E>) -> Result<Self, LoadError<E>> {
        let mut mark = [0; SIGNATURE.len()];
        read(0, &mut mark).map_err(LoadError::Read)?;
        if mark != SIGNATURE {
            return Err(FormatError::corrupt(0, "the file does not begin with the signature of a VHDX").into());
        }
        let mut copies = [[0; HEADER_BYTES]; 2];
        for (copy, offset) in copies.iter_mut().zip(HEADER_OFFSETS) {
            read(offset, copy).map_err(LoadError::Read)?;
        }
        let headers = Headers::choose(&copies[0], &copies[1])?;
        let log = headers.current.log();
        if log.end > file_length {
            let text = format!(
                "the log of {} bytes at byte {} goes past the end of the file",
                headers.current.log_length, log.start
            );
            return Err(FormatError::corrupt(HEADER_OFFSETS[headers.slot], text).into());
        }
        let replay = if headers.current.is_dirty() { Some(Self::replay(&headers, file_length, read)?) } else { None };
        let file_length = replay.as_ref().map_or(file_length, Replay::file_length);
        let mut read = |offset: u64, bytes: &mut [u8]| {
            read(offset, bytes)?;
            replay.iter().for_each(|replay| replay.apply(offset, bytes));
            Ok(())
        };
        let mut copies = [vec![0; REGION_TABLE_BYTES], vec![0; REGION_TABLE_BYTES]];
        for (copy, offset) in copies.iter_mut().zip(REGION_TABLE_OFFSETS) {
            read(offset, copy).map_err(LoadError::Read)?;
        }
        let regions = RegionTable::choose(&copies[0], &copies[1], &log, file_length)?;
        let metadata_region = regions.find(ids::METADATA, "metadata")?;
        let bat = regions.find(ids::BAT, "block allocation table")?;
        let metadata = Metadata::load(&metadata_region, &mut read)?;
        let (entries, room) = (Layout::of(&metadata).entries(), u64::from(bat.length) / 8);
        if entries > room {
            let text = format!("the block allocation table has room for {room} entries, and the disk needs {entries}");
            return Err(FormatError::corrupt(REGION_TABLE_OFFSETS[0], text).into());
        }
        let mut locator = None;
        if let Some(item) = metadata.locator.filter(|_| metadata.has_parent) {
            let mut bytes = vec![0; usize::try_from(item.length).unwrap_or(0)];
            let place = metadata_region.offset.saturating_add(item.offset.into());
            read(place, &mut bytes).map_err(LoadError::Read)?;
            locator = Some(Locator::parse(&bytes, place)?);
        }
        Ok(Self { headers, replay, file_length, regions, bat, metadata_region, metadata, locator })
    }

    /// Read the log, and find out what it has to do.
    fn replay<E>(headers: &Headers, file_length: u64, read: Read<'_, E>) -> Result<Replay, LoadError<E>> {
        let header = &headers.current;
        if header.log_length > MAX_REPLAYED_LOG {
            let text = format!(
                "its log of {} bytes is to be replayed, more than {MAX_REPLAYED_LOG}: attach it once where it was made",
                header.log_length
            );
            return Err(FormatError::unsupported(header.log_offset, text).into());
        }
        let mut log = vec![0; header.log_length as usize];
        read(header.log_offset, &mut log).map_err(LoadError::Read)?;
        let entries = active_sequence(&log, header)?;
        drop(log);
        Ok(Replay::new(entries, &header.log(), file_length)?)
    }

    /// The geometry of the disk.
    #[must_use]
    pub const fn layout(&self) -> Layout {
        Layout::of(&self.metadata)
    }

    /// What the image says of its parent's identity; `None` without a parent.
    #[must_use]
    pub fn lineage(&self) -> Option<Lineage> {
        let (locator, item) = (self.locator.as_ref()?, self.metadata.locator?);
        Some(Lineage::of(&self.headers.current, locator, &self.metadata_region, item))
    }

    /// Everything but blocks, ascending: the header section, the log, and regions that are not known as well.
    #[must_use]
    pub fn taken(&self) -> Vec<(Range<u64>, &'static str)> {
        let name = |id| match id {
            ids::BAT => "block allocation table",
            ids::METADATA => "metadata",
            _ => "region of another program",
        };
        let mut taken = vec![(0..crate::ALIGNMENT, "header section"), (self.headers.current.log(), "log")];
        taken.extend(self.regions.regions.iter().map(|region| (region.range(), name(region.id))));
        taken.sort_by_key(|(range, _)| range.start);
        taken
    }
}
