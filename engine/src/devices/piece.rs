//! The unit of work of a copying thread: segments of copies, read into one buffer and written from it.
//!
//! An overlay holds its disk in the order of the guest's writes, so a copy into new clusters gathers bytes from all over the
//! source, and a copy into a raw image scatters adjacent ones. Segments that are adjacent on one side take one system call there.

use super::aligned::AlignedBuffer;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Bytes of the longest piece, and of each thread's buffer.
pub const PIECE: u64 = 1 << 20;
/// Maximum number of segments in a piece: progress is reported after each piece.
const SEGMENTS: usize = 64;

/// A segment of a copy, of at most [`PIECE`] bytes. All of it lies in the target, whole blocks of it if that is open for direct I/O.
#[derive(Clone, Debug)]
pub struct Segment {
    /// From which file,
    pub source: Arc<File>,
    /// from where, in bytes,
    pub from: u64,
    /// and to where, in bytes.
    pub to: u64,
    /// How many bytes.
    pub length: u64,
    /// Which of several copies it is a segment of.
    pub copy: usize,
}

impl Segment {
    /// The bytes of it that go into this range of the target, which lies within it; `None` if that is empty.
    pub fn cut(&self, range: Range<u64>) -> Option<Self> {
        let skip = range.start.checked_sub(self.to)?;
        let length = range.end.checked_sub(range.start).filter(|&length| length > 0)?;
        Some(Self { from: self.from + skip, to: range.start, length, ..self.clone() })
    }
}

/// Segments that go into one file, ascending there, of [`PIECE`] bytes in all at most.
#[derive(Clone, Debug)]
pub struct Piece {
    target: Arc<File>,
    segments: Vec<Segment>,
    length: u64,
}

/// Combine segments, which ascend in the target, into pieces.
pub fn pieces(target: &Arc<File>, segments: impl IntoIterator<Item = Segment>) -> VecDeque<Piece> {
    let mut pieces: VecDeque<Piece> = VecDeque::new();
    for segment in segments {
        match pieces.back_mut() {
            Some(last) if last.length + segment.length <= PIECE && last.segments.len() < SEGMENTS => last.add(segment),
            _ => {
                pieces.push_back(Piece { target: Arc::clone(target), length: segment.length, segments: vec![segment] })
            }
        }
    }
    pieces
}

impl Piece {
    /// Bytes of all its segments.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The copy that its first segment belongs to.
    pub fn first_copy(&self) -> usize {
        self.segments.first().map_or(0, |segment| segment.copy)
    }

    fn add(&mut self, segment: Segment) {
        self.length += segment.length;
        self.segments.push(segment);
    }

    /// Copy it, through a buffer of [`PIECE`] bytes. What a source lacks, because it is shorter than it was, reads as zero.
    ///
    /// # Errors
    /// The copy that failed first, and why: the segments of those before it have arrived.
    pub fn copy(&self, buffer: &mut AlignedBuffer) -> Result<(), (usize, io::Error)> {
        let mut failed = None;
        let mut read = 0;
        let mut at = 0;
        for run in runs(&self.segments, |a, b| Arc::ptr_eq(&a.source, &b.source) && a.from + a.length == b.from) {
            let segments = self.segments.get(run.clone()).unwrap_or_default();
            let Some(first) = segments.first() else { break };
            let length = length_of(segments);
            if let Err(error) = part_of(buffer, at, length).and_then(|bytes| read_all(&first.source, first.from, bytes))
            {
                failed = Some((first.copy, error));
                break;
            }
            (at, read) = (at + length, run.end);
        }
        at = 0;
        let ready = self.segments.get(..read).unwrap_or_default();
        for run in runs(ready, |a, b| a.to + a.length == b.to) {
            let segments = ready.get(run).unwrap_or_default();
            let Some(first) = segments.first() else { break };
            let length = length_of(segments);
            part_of(buffer, at, length)
                .and_then(|bytes| self.target.write_all_at(bytes, first.to))
                .map_err(|error| (first.copy, error))?;
            at += length;
        }
        failed.map_or(Ok(()), Err)
    }
}

/// Bytes of these segments.
fn length_of(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| segment.length).sum()
}

/// The longest runs of neighbors of which each `goes_on` to the next.
fn runs<T>(items: &[T], goes_on: impl Fn(&T, &T) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if items.get(run.end - 1).is_some_and(|last| goes_on(last, item)) => run.end = index + 1,
            _ => runs.push(index..index + 1),
        }
    }
    runs
}

/// `length` bytes of the buffer from `at` on.
fn part_of(buffer: &mut AlignedBuffer, at: u64, length: u64) -> io::Result<&mut [u8]> {
    let range = usize::try_from(at).ok().zip(usize::try_from(at + length).ok());
    let bytes = range.and_then(|(from, to)| buffer.bytes().get_mut(from..to));
    bytes.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Fill `bytes` from a file; what it lacks reads as zero.
fn read_all(file: &File, from: u64, bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], from + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Direct reads end in the middle of a block where the file does, and cannot go on from there.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    bytes[done..].fill(0);
    Ok(())
}
