//! Reading an undo log, and restoring a file from it.
//!
//! The whole log is read, and every checksum compared, before the file changes. The log ends at the first invalid record: a
//! power loss can tear the last batch, before whose completion nothing changed. An invalid record before a batch that was
//! durable is damage, and the log is refused.
//!
//! Records can be written back in any order, any number of times: each range is in the log once, and the log does not change
//! until the file is durable again.

use super::beats::Beats;
use super::format::{sample, Beat, Header, Kind, Record, BEATS, FIRST, HEADER, RECORD, SAMPLE, SAMPLES, SOURCE};
use super::source::{time_of, Source};
use crate::devices::make_zero;
use crc32c::crc32c;
use rustix::fs::SeekFrom;
use rustix::io::{retry_on_intr, Errno};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

/// Bytes of the log that are searched at once for records behind its end.
const SEARCHED: usize = 1 << 20;

/// The reason why a log cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It is damaged, or none.
    #[error("{0}")]
    Malformed(&'static str),
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Unreadable(#[from] io::Error),
}

/// A log that is sound.
#[derive(Debug)]
pub struct Log<'f> {
    file: &'f File,
    header: Header,
    /// Where each record stands.
    records: Vec<(u64, Record)>,
}

/// The result of restoring a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Bytes that were written back, or are holes again.
    pub bytes: u64,
    /// Length of the file in bytes.
    pub length: u64,
}

fn read_block(file: &File, at: u64, bytes: &mut [u8]) -> io::Result<bool> {
    match file.read_exact_at(bytes, at) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn read_header(file: &File) -> Result<Header, Unusable> {
    let mut block = vec![0; HEADER];
    if !read_block(file, 0, &mut block)? {
        return Err(Unusable::Malformed("it is too short"));
    }
    Header::decode(&block).map_err(Unusable::Malformed)
}

fn read_sources(file: &File, header: &Header) -> Result<Vec<Source>, Unusable> {
    let mut block = vec![0; SOURCE];
    let mut sources = Vec::new();
    for index in 0..header.sources {
        let whole = read_block(file, FIRST + u64::from(index) * SOURCE as u64, &mut block)?;
        let source = Source::decode(&block, &header.nonce, index).filter(|_| whole);
        sources.push(source.ok_or(Unusable::Malformed("what it says of the committed images is damaged"))?);
    }
    Ok(sources)
}

/// What the commit took its data from, according to a log of which nothing else is read.
///
/// # Errors
/// [`Unusable`].
pub fn sources(file: &File) -> Result<Vec<Source>, Unusable> {
    read_sources(file, &read_header(file)?)
}

impl<'f> Log<'f> {
    /// Read a log.
    ///
    /// # Errors
    /// [`Unusable`].
    pub fn read(file: &'f File) -> Result<Self, Unusable> {
        let header = read_header(file)?;
        // They were durable before the file changed.
        read_sources(file, &header)?;
        let mut at = header.first();
        let mut log = Self { file, header, records: Vec::new() };
        while let Some(record) = log.next(at)? {
            log.records.push((at, record));
            at = at.saturating_add(RECORD as u64).saturating_add(record.room());
        }
        let count = log.records.len() as u64;
        if count < log.header.durable || log.is_damaged(at, count)? {
            return Err(Unusable::Malformed("a part of it is damaged that was written before other parts"));
        }
        Ok(log)
    }

    /// The record that stands here, if the next one does, with its data.
    fn next(&self, at: u64) -> io::Result<Option<Record>> {
        let mut block = [0; RECORD];
        if !read_block(self.file, at, &mut block)? {
            return Ok(None);
        }
        let record = Record::decode(&block, &self.header.nonce, self.header.length);
        let Some(record) = record.filter(|record| record.sequence == self.records.len() as u64) else {
            return Ok(None);
        };
        Ok(self.data(at, &record)?.map(|_| record))
    }

    /// The data of a record that stands here: empty for a hole, and `None` if it is not what it was.
    fn data(&self, at: u64, record: &Record) -> io::Result<Option<Vec<u8>>> {
        let Kind::Data(sum) = record.kind else { return Ok(Some(Vec::new())) };
        let mut data = vec![0; usize::try_from(record.length).unwrap_or(0)];
        let whole = read_block(self.file, at.saturating_add(RECORD as u64), &mut data)?;
        Ok(Some(data).filter(|data| whole && crc32c(data) == sum))
    }

    /// Whether behind its end, where the record of this number is missing, one stands that was made durable after that.
    fn is_damaged(&self, end: u64, missing: u64) -> io::Result<bool> {
        let length = self.file.metadata()?.len();
        let mut at = end;
        let mut bytes = vec![0; SEARCHED];
        while at < length {
            // A log may be longer than anything that was written into it.
            match rustix::fs::seek(self.file, SeekFrom::Data(at)) {
                Ok(data) => at = data,
                Err(Errno::NXIO) => break,
                // A file system that knows no holes.
                Err(_) => {}
            }
            let part = usize::try_from(length - at).unwrap_or(SEARCHED).min(SEARCHED);
            let part = &mut bytes[..part];
            if !read_block(self.file, at, part)? {
                break;
            }
            let mut found = part
                .chunks_exact(RECORD)
                .filter_map(|block| Record::decode(block, &self.header.nonce, self.header.length));
            if found.any(|record| record.batch > missing) {
                return Ok(true);
            }
            at = at.saturating_add(part.len() as u64);
        }
        Ok(false)
    }

    /// Return its description of the file.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// When the process that changed the file was alive last: as the log says, and as the system says of the log.
    #[must_use]
    pub fn last_alive(&self) -> (u64, u32) {
        let written = self.file.metadata().ok().map(|found| time_of(found.mtime(), found.mtime_nsec()));
        let beats = BEATS.into_iter().filter_map(|at| {
            let mut block = [0; RECORD];
            read_block(self.file, at, &mut block).ok().filter(|whole| *whole)?;
            Beat::decode(&block, &self.header.nonce)
        });
        let newest = beats.max_by_key(|beat| beat.number).map(|beat| beat.time);
        written.into_iter().chain(newest).max().unwrap_or(self.header.begun)
    }

    /// Find a part of the file that is not what it was, and of which the log says nothing: so the file was restored, or somebody else
    /// has written to it. Only [samples](sample) are looked at.
    ///
    /// # Errors
    /// The kernel's.
    pub fn foreign(&self, file: &File) -> io::Result<Option<u64>> {
        let length = self.header.length;
        let mut bytes = vec![0; usize::try_from(SAMPLE).unwrap_or(0)];
        for (index, sum) in (0..SAMPLES).zip(self.header.samples) {
            let range = sample(index, length);
            let kept = |record: &Record| record.range().start < range.end && range.start < record.range().end;
            if range.is_empty() || self.records.iter().any(|(_, record)| kept(record)) {
                continue;
            }
            let bytes = bytes.get_mut(..usize::try_from(range.end - range.start).unwrap_or(0)).unwrap_or_default();
            if !read_block(file, range.start, bytes)? || crc32c(bytes) != sum {
                return Ok(Some(range.start));
            }
        }
        Ok(None)
    }

    /// Whether a file of `length` bytes may be what the log's became. Before it is cut, what is cut off is kept: a file that is shorter
    /// for another reason was restored or made again, and the log says nothing of it.
    #[must_use]
    pub fn goes_with(&self, length: u64) -> bool {
        let mut kept: Vec<Range<u64>> = self.records.iter().map(|(_, record)| record.range()).collect();
        kept.sort_by_key(|range| range.start);
        let reached = kept.iter().fold(length, |at, range| if range.start <= at { at.max(range.end) } else { at });
        reached >= self.header.length
    }

    /// Restore the file, durably.
    ///
    /// # Errors
    /// The kernel's. The log is as it was, and can be applied again.
    pub fn apply(&self, file: &File) -> io::Result<Restored> {
        let length = self.header.length;
        // What was written since the last beat is written by this: a second run has to know.
        let mut beats = Beats::of(self.file, self.header.nonce);
        beats.beat(true)?;
        // The log has the part that was cut off. The length of a device is fixed.
        if !file.metadata()?.file_type().is_block_device() {
            retry_on_intr(|| rustix::fs::ftruncate(file, length))?;
        }
        let mut bytes: u64 = 0;
        // Holes first: on a full disk, they make the room that data has to have which was punched since. No two records are about
        // the same bytes.
        let (holes, data): (Vec<&(u64, Record)>, Vec<_>) =
            self.records.iter().partition(|(_, record)| record.kind == Kind::Hole);
        for (at, record) in holes.into_iter().chain(data) {
            beats.beat(false)?;
            match record.kind {
                Kind::Hole => make_zero(file, record.offset, record.length)?,
                Kind::Data(_) => {
                    let changed = || io::Error::other("the undo log changed while it was read");
                    let data = self.data(*at, record)?.ok_or_else(changed)?;
                    file.write_all_at(&data, record.offset)?;
                }
            }
            bytes = bytes.saturating_add(record.length);
        }
        retry_on_intr(|| rustix::fs::fdatasync(file))?;
        Ok(Restored { bytes, length })
    }
}
