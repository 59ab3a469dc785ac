//! Reads and writes that bypass the page cache (`O_DIRECT`): whole blocks, through an aligned buffer.
//!
//! Where a write covers a part of a block, the rest is read before and written again. The last block of a file that does
//! not fill it is written through the page cache, so that the file does not become longer: the kernel keeps both ways
//! coherent (open(2), "O_DIRECT").

use super::aligned::{AlignedBuffer, MEMORY};
use super::retry;
use rustix::fs::{AtFlags, OFlags, StatxFlags};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Block size in bytes where the kernel does not tell (before Linux 6.1).
const USUAL_BLOCK: u32 = 4096;

/// The way in which a file is read and written without the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    /// Offsets and lengths are multiples of this many bytes, a power of two.
    block: u64,
}

impl Direct {
    /// Switch a file's descriptor to direct I/O.
    ///
    /// # Errors
    /// When the file system does not support it.
    pub fn begin(file: &File) -> io::Result<Self> {
        let block = told(file).unwrap_or(Some(USUAL_BLOCK));
        let block = block.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        set(file, true)?;
        Ok(Self { block: block.into() })
    }

    /// Return the parameters of direct I/O on this file, if the kernel supports it. Changes nothing.
    pub fn possible(file: &File) -> Option<Self> {
        told(file).flatten().map(|block| Self { block: block.into() })
    }

    /// Offsets and lengths are multiples of this many bytes, a power of two.
    pub fn block(self) -> u64 {
        self.block
    }

    /// Switch direct I/O on or off, for a file of which [`Direct::possible`] says that it can be.
    pub fn switch(file: &File, on: bool) -> io::Result<()> {
        set(file, on)
    }

    /// Run `call` with direct I/O on a file that otherwise uses the page cache.
    pub fn directly<T>(file: &File, call: impl FnOnce() -> T) -> io::Result<T> {
        set(file, true)?;
        let result = call();
        set(file, false)?;
        Ok(result)
    }

    fn down(self, offset: u64) -> u64 {
        offset - offset % self.block
    }

    fn up(self, offset: u64) -> io::Result<u64> {
        offset.checked_next_multiple_of(self.block).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// Read up to `out.len()` bytes at `offset`; fewer only at the end of the file.
    pub fn read_at(self, file: &File, offset: u64, out: &mut [u8]) -> io::Result<usize> {
        let start = self.down(offset);
        let mut buffer = AlignedBuffer::new(self.up(offset.saturating_add(out.len() as u64))? - start);
        let mut done = 0;
        while done < buffer.len() {
            match file.read_at(&mut buffer.bytes()[done..], start + done as u64) {
                Ok(0) => break,
                Ok(length) => done += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            // In the middle of a block ends the file.
            if !(done as u64).is_multiple_of(self.block) {
                break;
            }
        }
        let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
        let length = done.saturating_sub(skip).min(out.len());
        out[..length].copy_from_slice(&buffer.bytes()[skip..skip + length]);
        Ok(length)
    }

    /// Write all of `bytes` at `offset` of a file that is `length` bytes long.
    pub fn write_all_at(self, file: &File, offset: u64, bytes: &[u8], length: u64) -> io::Result<()> {
        let end = offset.saturating_add(bytes.len() as u64);
        // Blocks up to here are in the file as a whole; of others only those are written that are covered as a whole.
        let whole = self.down(length);
        let from = if self.down(offset) < whole { offset } else { self.up(offset)?.min(end) };
        let to = if self.up(end)? <= whole { end } else { self.down(end).max(from) };
        let part = |from: u64, to: u64| {
            let range = usize::try_from(from - offset).ok().zip(usize::try_from(to - offset).ok());
            range.and_then(|(from, to)| bytes.get(from..to)).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
        };
        if offset < from {
            self.buffered(file, |file| file.write_all_at(part(offset, from)?, offset))?;
        }
        if from < to {
            let (start, stop) = (self.down(from), self.up(to)?);
            let mut buffer = AlignedBuffer::new(stop - start);
            for (edge, partial) in [(start, start < from), (stop - self.block, to < stop)] {
                if partial {
                    let at = usize::try_from(edge - start).unwrap_or(usize::MAX);
                    let size = usize::try_from(self.block).unwrap_or(0);
                    let read = self.read_at(file, edge, &mut buffer.bytes()[at..at + size])?;
                    if read < size {
                        // The file is shorter than it was.
                        return Err(io::Error::from_raw_os_error(libc::EIO));
                    }
                }
            }
            let at = usize::try_from(from - start).unwrap_or(usize::MAX);
            let middle = part(from, to)?;
            buffer.bytes()[at..at + middle.len()].copy_from_slice(middle);
            file.write_all_at(buffer.bytes(), start)?;
        }
        if to < end {
            self.buffered(file, |file| file.write_all_at(part(to, end)?, to))?;
        }
        Ok(())
    }

    /// Run `call` through the page cache.
    pub fn buffered<T>(self, file: &File, call: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        set(file, false)?;
        let result = call(file);
        set(file, true)?;
        result
    }
}

/// The block size of a file for direct I/O; `Some(None)` if there is none, or it asks for more than is done here. `None` if the
/// kernel does not tell (before Linux 6.1).
fn told(file: &File) -> Option<Option<u32>> {
    let known = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    if !StatxFlags::from_bits_retain(known.stx_mask).contains(StatxFlags::DIOALIGN) {
        return None;
    }
    let block = known.stx_dio_offset_align;
    Some((block.is_power_of_two() && known.stx_dio_mem_align as usize <= MEMORY).then_some(block))
}

/// Switch direct I/O on or off.
fn set(file: &File, on: bool) -> io::Result<()> {
    let mut flags = retry(|| rustix::fs::fcntl_getfl(file))?;
    flags.set(OFlags::DIRECT, on);
    retry(|| rustix::fs::fcntl_setfl(file, flags))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]
mod tests {
    use super::*;

    /// A file on a file system that knows direct I/O: the one that this is built on, if the directory for temporary files
    /// is not.
    fn file(bytes: &[u8]) -> (File, Direct) {
        let directories = [std::env::temp_dir(), env!("CARGO_MANIFEST_DIR").into()];
        let open = |directory: &std::path::PathBuf| {
            let file = tempfile::tempfile_in(directory).unwrap();
            let direct = Direct::begin(&file).ok()?;
            direct.buffered(&file, |file| file.write_all_at(bytes, 0)).unwrap();
            Some((file, direct))
        };
        directories.iter().find_map(open).expect("no file system with O_DIRECT")
    }

    fn content(file: &File, direct: Direct) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        direct.buffered(file, |file| file.read_exact_at(&mut bytes, 0)).unwrap();
        bytes
    }

    #[test]
    fn every_alignment_is_read_and_written() {
        for length in [0, 1, 511, 512, 4096, 4097, 8192, 10_000, 12_288] {
            for offset in [0, 1, 511, 512, 513, 4095, 4096, 4100, 8192, 9999, 13_000] {
                for count in [1, 2, 511, 512, 513, 3584, 4096, 4097, 8192] {
                    let mut model: Vec<u8> = (0..length).map(|i| (i % 241) as u8).collect();
                    let (file, direct) = file(&model);
                    let bytes: Vec<u8> = (0..count).map(|i| (i % 239) as u8 ^ 0x80).collect();
                    let mut read = vec![7; count];
                    let got = direct.read_at(&file, offset as u64, &mut read).unwrap();
                    let wanted = &model[offset.min(length)..(offset + count).min(length).max(offset.min(length))];
                    assert_eq!(&read[..got], wanted, "{length} {offset} {count}");
                    direct.write_all_at(&file, offset as u64, &bytes, length as u64).unwrap();
                    model.resize(length.max(offset + count), 0);
                    model[offset..offset + count].copy_from_slice(&bytes);
                    assert!(content(&file, direct) == model, "{length} {offset} {count}");
                }
            }
        }
    }

    #[test]
    fn direct_and_buffered_pieces_see_each_other() {
        let (file, direct) = file(&[]);
        let mut model = Vec::new();
        for round in 0..200usize {
            let (offset, count) = (round * 7919 % 20_000, 1 + round * 131 % 9000);
            let bytes = vec![round as u8; count];
            direct.write_all_at(&file, offset as u64, &bytes, model.len() as u64).unwrap();
            model.resize(model.len().max(offset + count), 0);
            model[offset..offset + count].copy_from_slice(&bytes);
            let mut all = vec![0; model.len() + 10];
            assert_eq!(direct.read_at(&file, 0, &mut all).unwrap(), model.len());
            assert!(all[..model.len()] == model, "round {round}");
        }
        assert!(content(&file, direct) == model);
    }
}
