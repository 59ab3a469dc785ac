//! What a commit takes its data from: its overlay, and every other layer and file that it merges. The log says what each of them was.
//!
//! As long as they are what they were, they hold everything that the log takes out of the file again. Another commit, of a program that
//! does not see the log, may have finished meanwhile and emptied the overlay: then the file alone has the data, and the log would
//! destroy the last copy.
//!
//! One block of [`SOURCE`] bytes for each, behind the beats:
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | [`MAGIC`] |
//! | 8 | 16 | the log's number |
//! | 24 | 4 | its place among them, from 0 |
//! | 28 | 4 | bytes of its path |
//! | 32 | 8 | its inode; 0 for a device |
//! | 40 | 8, 4 | when it was made: seconds and nanoseconds; 0 where the file system does not say, and for a device |
//! | 52 | 8, 4 | when it was written last; 0 for a device |
//! | 64 | 8 | its length in bytes |
//! | 72 | 32 | of a block device: SHA-256 of what tells it from every other; zeroes if nothing does, and for a file |
//! | 104 | 4 | 1: a file; 2: a block device |
//! | 108 | 4 | CRC-32C of its [first bytes](Source::look) |
//! | 112 | 3980 | its path |
//! | 4092 | 4 | CRC-32C of the bytes before |

use super::format::{is_sealed, number, put, seal, word, SOURCE};
use crate::devices::AlignedBuffer;
use crc32c::crc32c_append;
use rustix::fs::{fstat, statx, AtFlags, FileType, StatxFlags};
use rustix::io::{pread, retry_on_intr};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The first bytes of one.
const MAGIC: &[u8; 8] = b"undo src";
const PATH: usize = 112;
const MOST_PATH: usize = SOURCE - 4 - PATH;
const FILE: u32 = 1;
const DEVICE: u32 = 2;

/// Bytes of a file that are compared: whatever its time says, `touch` can have said it.
const OF_FILE: u64 = 1 << 20;
/// Of a device, which has no times: so many that the tables of a new qcow2 image are among them, whose clusters have 2 MiB at most.
const OF_DEVICE: u64 = 16 << 20;
/// Bytes that are read at once.
const PIECE: u64 = 1 << 20;
/// What direct I/O begins at a multiple of.
const ALIGNMENT: usize = 4096;

/// An image, or a file of one, that a commit takes data from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Where it is.
    pub path: PathBuf,
    /// A block device, and not a file.
    pub device: bool,
    /// Its inode.
    pub inode: u64,
    /// When it was made: seconds and nanoseconds.
    pub born: (u64, u32),
    /// When it was written last.
    pub changed: (u64, u32),
    /// Its length in bytes.
    pub length: u64,
    /// What a block device is.
    pub subject: [u8; 32],
    /// The checksum of its first bytes.
    pub sum: u32,
}

/// A time of a file.
pub(super) fn time_of(seconds: i64, nanoseconds: i64) -> (u64, u32) {
    (u64::try_from(seconds).unwrap_or(0), u32::try_from(nanoseconds).unwrap_or(0))
}

/// When a file was made: seconds and nanoseconds; 0 where the file system does not say.
#[must_use]
pub fn born(file: &File) -> (u64, u32) {
    let found = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok();
    let found = found.filter(|found| found.stx_mask & StatxFlags::BTIME.bits() != 0);
    found.map_or((0, 0), |found| (found.stx_btime.tv_sec.cast_unsigned(), found.stx_btime.tv_nsec))
}

/// The checksum of the first `end` bytes, or of all if there are fewer. It may be open for direct I/O.
fn checksum(file: &File, end: u64) -> io::Result<u32> {
    let mut buffer = AlignedBuffer::new(PIECE.min(end.next_multiple_of(ALIGNMENT as u64)));
    let (mut sum, mut at) = (0, 0);
    while at < end {
        let bytes = buffer.bytes();
        let read = retry_on_intr(|| pread(file, &mut *bytes, at))?;
        // What comes next has to begin at a whole block, too.
        let whole = if read > ALIGNMENT { read - read % ALIGNMENT } else { read };
        let used = if at + read as u64 >= end { usize::try_from(end - at).unwrap_or(read) } else { whole };
        if used == 0 {
            break;
        }
        sum = crc32c_append(sum, bytes.get(..used).unwrap_or_default());
        at += used as u64;
    }
    Ok(sum)
}

impl Source {
    /// What an open file or device is now. `length` and `subject` are those of a device.
    ///
    /// # Errors
    /// The kernel's.
    pub fn look(file: &File, path: &Path, length: u64, subject: [u8; 32]) -> io::Result<Self> {
        let stat = fstat(file)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
            let sum = checksum(file, length.min(OF_DEVICE))?;
            return Ok(Self { path: path.to_owned(), device: true, length, subject, sum, ..Self::default() });
        }
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        Ok(Self {
            path: path.to_owned(),
            device: false,
            inode: stat.st_ino,
            born: born(file),
            changed: time_of(stat.st_mtime, stat.st_mtime_nsec.cast_signed()),
            length,
            subject: [0; 32],
            sum: checksum(file, length.min(OF_FILE))?,
        })
    }

    /// Why `found`, which is at its path now, is not what it was: one clause.
    #[must_use]
    pub fn difference(&self, found: &Self) -> Option<&'static str> {
        let known = |subject: &[u8; 32]| *subject != [0; 32];
        let other_device = known(&self.subject) && known(&found.subject) && self.subject != found.subject;
        let other_birth = self.born != found.born && self.born != (0, 0);
        if self.device != found.device || other_device || self.inode != found.inode || other_birth {
            Some("is another file or device now")
        } else if self.length != found.length {
            Some("has another length now")
        } else if self.changed != found.changed {
            Some("was written to since")
        } else if self.sum != found.sum {
            Some("begins with something else now")
        } else {
            None
        }
    }

    /// Whether a log has room for this path.
    #[must_use]
    pub fn has_room_for(path: &Path) -> bool {
        path.as_os_str().len() <= MOST_PATH
    }

    /// Encode it for the log with this number; `None` for a path that is too long.
    #[must_use]
    pub fn encode(&self, nonce: &[u8; 16], index: u32) -> Option<Vec<u8>> {
        let path = self.path.as_os_str().as_bytes();
        let named = u32::try_from(path.len()).ok().filter(|_| path.len() <= MOST_PATH)?;
        let mut block = vec![0; SOURCE];
        put(&mut block, 0, MAGIC);
        put(&mut block, 8, nonce);
        put(&mut block, 24, &index.to_le_bytes());
        put(&mut block, 28, &named.to_le_bytes());
        put(&mut block, 32, &self.inode.to_le_bytes());
        put(&mut block, 40, &self.born.0.to_le_bytes());
        put(&mut block, 48, &self.born.1.to_le_bytes());
        put(&mut block, 52, &self.changed.0.to_le_bytes());
        put(&mut block, 60, &self.changed.1.to_le_bytes());
        put(&mut block, 64, &self.length.to_le_bytes());
        put(&mut block, 72, &self.subject);
        put(&mut block, 104, &(if self.device { DEVICE } else { FILE }).to_le_bytes());
        put(&mut block, 108, &self.sum.to_le_bytes());
        put(&mut block, PATH, path);
        seal(&mut block);
        Some(block)
    }

    /// Decode these [`SOURCE`] bytes, if they are this one of the log with this number.
    #[must_use]
    pub fn decode(block: &[u8], nonce: &[u8; 16], index: u32) -> Option<Self> {
        let ours = block.len() == SOURCE && block.get(..8)? == MAGIC && block.get(8..24)? == nonce;
        if !ours || !is_sealed(block) || word(block, 24)? != index {
            return None;
        }
        let named = usize::try_from(word(block, 28)?).ok().filter(|named| *named <= MOST_PATH)?;
        Some(Self {
            path: OsStr::from_bytes(block.get(PATH..PATH + named)?).into(),
            device: match word(block, 104)? {
                FILE => false,
                DEVICE => true,
                _ => return None,
            },
            inode: number(block, 32)?,
            born: (number(block, 40)?, word(block, 48)?),
            changed: (number(block, 52)?, word(block, 60)?),
            length: number(block, 64)?,
            subject: block.get(72..104)?.try_into().ok()?,
            sum: word(block, 108)?,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn source() -> Source {
        let path = PathBuf::from("/images/top");
        Source { path, device: true, inode: 3, born: (4, 5), changed: (6, 7), length: 8, subject: [9; 32], sum: 10 }
    }

    #[test]
    fn what_is_written_is_read() {
        for source in [source(), Source { device: false, ..source() }] {
            let block = source.encode(&[7; 16], 2).unwrap();
            assert_eq!(Source::decode(&block, &[7; 16], 2), Some(source));
            assert_eq!(Source::decode(&block, &[8; 16], 2), None, "of another log");
            assert_eq!(Source::decode(&block, &[7; 16], 1), None, "another one");
            for bit in (0..block.len() * 8).step_by(3) {
                let mut torn = block.clone();
                torn[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Source::decode(&torn, &[7; 16], 2), None, "{bit}");
            }
        }
        let longest = Source { path: "x".repeat(MOST_PATH).into(), ..source() };
        let block = longest.encode(&[7; 16], 0).unwrap();
        assert_eq!(Source::decode(&block, &[7; 16], 0), Some(longest));
        assert!(Source { path: "x".repeat(MOST_PATH + 1).into(), ..source() }.encode(&[7; 16], 0).is_none());
    }

    #[test]
    fn each_difference_is_seen() {
        let was = source();
        assert_eq!(was.difference(&source()), None);
        // Where nothing says what a device is, its name has to do.
        assert_eq!(was.difference(&Source { subject: [0; 32], ..source() }), None);
        assert_eq!(was.difference(&Source { path: "/elsewhere".into(), ..source() }), None);
        for (found, mention) in [
            (Source { device: false, ..source() }, "another file or device"),
            (Source { subject: [1; 32], ..source() }, "another file or device"),
            (Source { inode: 1, ..source() }, "another file or device"),
            (Source { born: (4, 6), ..source() }, "another file or device"),
            (Source { length: 9, ..source() }, "another length"),
            (Source { changed: (6, 8), ..source() }, "written to"),
            (Source { sum: 1, ..source() }, "begins with"),
        ] {
            assert!(was.difference(&found).unwrap().contains(mention), "{found:?}");
        }
    }

    #[test]
    fn the_first_bytes_count() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3_000_001_u32).map(|at| (at % 251) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        for end in [0, 1, 4095, 4097, 1 << 20, (1 << 20) + 1, 3_000_001] {
            let whole = crc32c::crc32c(&bytes[..usize::try_from(end).unwrap()]);
            assert_eq!(checksum(&file, end).unwrap(), whole, "{end}");
        }
        assert_eq!(checksum(&file, 5_000_000).unwrap(), crc32c::crc32c(&bytes), "past the end");
        let look = || Source::look(&file, Path::new("top"), 0, [0; 32]).unwrap();
        let was = look();
        assert_eq!((was.length, was.device, was.sum), (3_000_001, false, crc32c::crc32c(&bytes[..1 << 20])));
        file.write_all_at(b"x", (1 << 20) - 1).unwrap();
        assert_ne!(look().sum, was.sum);
    }
}
