//! A target that is changed in place, with its old content in a log beside it.
//!
//! The order, and the crash that each step survives:
//!
//! 1. what is about to change is appended to the log, and flushed. The target is as it was, whichever part of the log
//!    arrives;
//! 2. before the first change, the log gets its name, and its directory is flushed: from here on every command finds it;
//! 3. only then does the target change. A crash leaves a log that says all that is needed to undo it;
//! 4. once the target is complete and durable, the log is cut to nothing, durably, and then removed. From the cut on it undoes
//!    nothing, also under another name.

use crate::create::NewFile;
use crate::devices::{Before, BeforeChange};
use crate::error::{reason, Error};
use crate::escape::{escape_bytes, shell_path};
use crate::image::OpenedFile;
use crate::lookup::{Directory, Identity};
use crate::undo::{log_name, Header, Kind, Log, Record, HEADER, KEPT_BLOCK as BLOCK, MOST_DATA};
use crc32c::crc32c;
use instar_guest_abi::ErrorCode;
use rustix::fs::{
    fchown, fcntl_getfl, fcntl_setfl, fstat, fsync, ftruncate, openat, statx, unlinkat, AtFlags, Gid, Mode, OFlags,
    StatxFlags, Uid,
};
use rustix::io::retry_on_intr;
use std::collections::hash_map::RandomState;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::hash::BuildHasher;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The log of a target, and the ranges that it keeps.
#[derive(Debug)]
pub struct UndoLog {
    /// The target, for messages and to restore it.
    path: PathBuf,
    target: File,
    identity: Identity,
    name: OsString,
    directory: Directory,
    flushed: OwnedFd,
    /// The log under way to its name.
    new: Option<NewFile>,
    log: File,
    header: Header,
    /// Where the next record goes.
    end: u64,
    sequence: u64,
    /// The ranges that it keeps: where each begins and ends.
    kept: BTreeMap<u64, u64>,
    /// Whether a range could not be kept: from then on, nothing may change.
    failed: Option<i32>,
}

impl UndoLog {
    /// Make the log of a target. The log has no name until the target is about to change.
    ///
    /// # Errors
    /// The system's error; or a target of another user, whose log could not be distinguished from a forged one.
    pub fn begin(target: &OpenedFile, directory: &Directory, name: &OsStr) -> Result<Self, Error> {
        let path = &target.path;
        let log_path = directory.path().join(log_name(name));
        let cannot = |what: &str, error: &io::Error| Error::io(&log_path, ErrorCode::OpenFailed, what, error);
        let stat = fstat(target.file.file()).map_err(|errno| cannot("cannot be created", &errno.into()))?;
        let caller = rustix::process::geteuid();
        if !caller.is_root() && caller.as_raw() != stat.st_uid {
            let clause =
                "belongs to somebody else: an undo log counts only if the image's owner or root wrote it, so run this \
                          as one of them, or commit without --atomic";
            return Err(Error::image(path, ErrorCode::PermissionDenied, clause));
        }
        let new = NewFile::begin_beside(&log_path, directory, &log_name(name), Mode::from_raw_mode(0o600))?;
        let log = new.file().try_clone().map_err(|error| cannot("cannot be created", &error))?;
        // So that the owner can use it, too. Root's counts as well.
        if caller.is_root() && stat.st_uid != 0 {
            let _ = fchown(&log, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let flushed = openat(directory, ".", flags, Mode::empty());
        let flushed = flushed.map_err(|errno| cannot("is in a directory that cannot be opened", &errno.into()))?;
        let file = target.file.file().try_clone().map_err(|error| cannot("cannot be created", &error))?;
        let born = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::BTIME).ok();
        let born = born.filter(|found| found.stx_mask & StatxFlags::BTIME.bits() != 0);
        let header = Header {
            nonce: nonce(),
            length: target.length(),
            inode: stat.st_ino,
            device: stat.st_dev,
            born: born.map_or((0, 0), |found| (found.stx_btime.tv_sec.cast_unsigned(), found.stx_btime.tv_nsec)),
            durable: 0,
            name: name.as_bytes().to_vec(),
        };
        if header.encode().is_none() {
            return Err(Error::image(path, ErrorCode::OpenFailed, "has a name that is too long for an undo log"));
        }
        Ok(Self {
            path: path.clone(),
            target: file,
            identity: target.identity,
            name: name.to_owned(),
            directory: directory.clone(),
            flushed,
            new: Some(new),
            log,
            header,
            end: HEADER as u64,
            sequence: 0,
            kept: BTreeMap::new(),
            failed: None,
        })
    }

    /// Its path, for messages.
    fn log_path(&self) -> PathBuf {
        self.directory.path().join(log_name(&self.name))
    }

    /// Whether it has its name, so that the target may be changed.
    fn is_named(&self) -> bool {
        self.new.is_none()
    }

    /// The reason why the log could not keep a range, if that ended the operation.
    pub fn failure(&self) -> Option<Error> {
        let error = io::Error::from_raw_os_error(self.failed.filter(|&errno| errno != libc::EINTR)?);
        Some(Error::io(&self.log_path(), ErrorCode::BackingIo, "what the target holds cannot be kept", &error))
    }

    /// The parts of these ranges, in whole blocks, that lie within the file and are not kept yet; ascending.
    fn missing(&self, ranges: &[Range<u64>]) -> Vec<Range<u64>> {
        let length = self.header.length;
        let block = |range: &Range<u64>| {
            let start = range.start / BLOCK * BLOCK;
            let end = range.end.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
            start..end.min(length)
        };
        let mut wanted: Vec<Range<u64>> = ranges
            .iter()
            .filter(|range| range.start < range.end)
            .map(block)
            .filter(|range| range.start < range.end)
            .collect();
        wanted.sort_by_key(|range| range.start);
        let mut missing = Vec::new();
        let mut from = 0;
        for Range { start, end } in wanted {
            let mut at = start.max(from);
            from = from.max(end);
            while at < end {
                let before = self.kept.range(..=at).next_back().map_or(0, |(_, end)| *end);
                if before > at {
                    at = before;
                    continue;
                }
                let next = self.kept.range(at..).next().map_or(end, |(start, _)| (*start).min(end));
                missing.push(at..next);
                at = next;
            }
        }
        missing
    }

    /// Record that this range is kept.
    fn note(&mut self, range: &Range<u64>) {
        let Range { mut start, mut end } = *range;
        if let Some((&before, &until)) = self.kept.range(..=start).next_back().filter(|(_, &until)| until >= start) {
            start = before;
            end = end.max(until);
        }
        if let Some((&after, &until)) = self.kept.range(end..).next().filter(|(&after, _)| after == end) {
            self.kept.remove(&after);
            end = until;
        }
        self.kept.insert(start, end);
    }

    /// Append the content of a range.
    fn append(
        &mut self,
        device: &dyn Before,
        range: &Range<u64>,
        batch: u64,
        go_on: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            go_on()?;
            let (data, hole) = device.next_data(at, range.end);
            if data > at {
                self.record(
                    Record { sequence: self.sequence, batch, offset: at, length: data - at, kind: Kind::Hole },
                    &[],
                )?;
            }
            let mut from = data;
            while from < hole {
                go_on()?;
                let length = (hole - from).min(MOST_DATA);
                let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
                device.read(from, &mut bytes)?;
                let kind = Kind::Data(crc32c(&bytes));
                self.record(Record { sequence: self.sequence, batch, offset: from, length, kind }, &bytes)?;
                from += length;
            }
            at = hole.max(data);
        }
        Ok(())
    }

    fn record(&mut self, record: Record, data: &[u8]) -> io::Result<()> {
        let mut block = record.encode(&self.header.nonce);
        block.extend_from_slice(data);
        let room = usize::try_from(record.room()).unwrap_or(0);
        block.resize(block.len() - data.len() + room, 0);
        self.log.write_all_at(&block, self.end)?;
        self.end += block.len() as u64;
        self.sequence += 1;
        Ok(())
    }

    /// Keep ranges durably.
    fn keep(
        &mut self,
        device: &dyn Before,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let missing = self.missing(ranges);
        let batch = self.sequence;
        missing.iter().try_for_each(|range| self.append(device, range, batch, go_on))?;
        if self.is_named() && missing.is_empty() {
            return Ok(());
        }
        if !self.is_named() {
            self.header.durable = self.sequence;
            self.log.write_all_at(&self.header.encode().unwrap_or_default(), 0)?;
        }
        flush(&self.log)?;
        if let Some(new) = &mut self.new {
            // A crash before its directory is flushed may lose the name: the target is as it was.
            if let Err(error) = new.publish(true) {
                // It may have the name, and not durably: nothing was changed that it would undo.
                let _ = self.remove(&self.log_path());
                return Err(io::Error::from_raw_os_error(error.errno().unwrap_or(libc::EEXIST)));
            }
            self.new = None;
        }
        missing.iter().for_each(|range| self.note(range));
        Ok(())
    }

    /// Truncate the log, because the target is complete and durable: from here on, the log undoes nothing.
    ///
    /// # Errors
    /// The system's error: whatever a crash leaves then, the target can be restored or is complete.
    pub fn complete(&mut self) -> Result<(), Error> {
        if !self.is_named() {
            return Ok(());
        }
        let found = self.directory.entry(&self.name);
        if found != Ok(self.identity) {
            let clause = "was moved or replaced by another process meanwhile, and is given back what it was";
            return Err(Error::image(&self.path, ErrorCode::OpenFailed, clause));
        }
        let log = self.log_path();
        let cannot = |what: &'static str| {
            let log = log.clone();
            move |errno: rustix::io::Errno| Error::io(&log, ErrorCode::BackingIo, what, &errno.into())
        };
        // This is the moment of the commit: what was cut is no log, whatever it is called.
        retry_on_intr(|| ftruncate(&self.log, 0)).map_err(cannot("cannot be cut"))?;
        self.end = 0;
        retry_on_intr(|| fsync(&self.log)).map_err(cannot("cannot be flushed"))?;
        self.remove(&log)
    }

    /// Remove the log, which is empty.
    fn remove(&self, log: &Path) -> Result<(), Error> {
        let name = log_name(&self.name);
        // Only if it is this one.
        let cannot =
            |errno: rustix::io::Errno| Error::io(log, ErrorCode::BackingIo, "cannot be removed", &errno.into());
        let own = fstat(&self.log).map(|stat| Identity::of(&stat)).map_err(cannot)?;
        let found = self.directory.entry(&name);
        if found == Ok(own) {
            unlinkat(&self.directory, &name, AtFlags::empty()).map_err(cannot)?;
            // A crash that brings it back brings back an empty one.
            let _ = retry_on_intr(|| fsync(&self.flushed));
        }
        Ok(())
    }

    /// Restore the target, and remove the log. Returns the state of the files.
    pub fn undo(&mut self) -> String {
        if !self.is_named() {
            return super::AS_IT_WAS.to_owned();
        }
        if self.end == 0 {
            return format!(
                "the target is complete and the overlay reads as before; `instar recover {}` removes what is left of the undo \
                 log, and running the commit again finishes it",
                shell_path(&self.path)
            );
        }
        match self.give_back() {
            Ok(()) => super::AS_IT_WAS.to_owned(),
            Err(why) => format!(
                "the target could not be given back what it was ({why}): `instar recover {}` does that",
                shell_path(&self.path)
            ),
        }
    }

    fn give_back(&mut self) -> Result<(), String> {
        let why = |error: &io::Error| reason(error).to_string();
        // Blocks of the log need not be those of direct I/O.
        if let Ok(flags) = fcntl_getfl(&self.target) {
            let _ = fcntl_setfl(&self.target, flags - OFlags::DIRECT);
        }
        let log = Log::read(&self.log).map_err(|unusable| escape_bytes(unusable.to_string().as_bytes()).to_string())?;
        log.apply(&self.target).map_err(|error| why(&error))?;
        retry_on_intr(|| ftruncate(&self.log, 0)).map_err(|errno| why(&errno.into()))?;
        let _ = retry_on_intr(|| fsync(&self.log));
        self.remove(&self.log_path()).map_err(|error| error.message)
    }
}

impl BeforeChange for UndoLog {
    fn before(
        &mut self,
        device: &dyn Before,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        if let Some(errno) = self.failed {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.keep(device, ranges, go_on).inspect_err(|error| {
            // What was appended in vain is in the way of what would follow.
            self.failed = Some(error.raw_os_error().unwrap_or(libc::EIO));
        })
    }
}

fn flush(file: &File) -> io::Result<()> {
    Ok(retry_on_intr(|| rustix::fs::fdatasync(file))?)
}

/// A number that no other log has.
fn nonce() -> [u8; 16] {
    let draw = || RandomState::new().hash_one(std::process::id()).to_le_bytes();
    let mut nonce = [0; 16];
    nonce[..8].copy_from_slice(&draw());
    nonce[8..].copy_from_slice(&draw());
    nonce
}

#[cfg(test)]
#[path = "undo_log_tests.rs"]
mod tests;
