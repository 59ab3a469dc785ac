//! A target that is changed in place, with its old content in a log beside it.
//!
//! The order, and the crash that each step survives:
//!
//! The log of a file lies beside it; that of a block device in the [directory](crate::image::UndoDirectory) that the operator names, and
//! it is named after what the device is.
//!
//! 1. what is about to change is appended to the log, and flushed. The target is as it was, whichever part of the log
//!    arrives;
//! 2. before the first change, the log says what the overlay and the other [sources](super::sources) of the commit are, which are
//!    flushed before, so that no crash makes them look older; then it gets its name, and its directory is flushed: from here on every
//!    command finds it. An overlay that records the identity that its parent will have has done so by then, and the devices let no
//!    source change any more until step 4: after every crash, the sources are what the log says, unless another program changed them;
//! 3. only then does the target change. A crash leaves a log that says all that is needed to undo it;
//! 4. once the target is complete and durable, the log is cut to nothing, durably, and then removed. From the cut on it undoes
//!    nothing, also under another name.

use super::kept::Kept;
use super::sources::Sources;
use crate::create::NewFile;
use crate::devices::{Before, BeforeChange};
use crate::error::{reason, Error};
use crate::escape::{escape_bytes, shell_path};
use crate::image::{DeviceIdentity, OpenedFile};
use crate::lookup::{Directory, Identity};
use crate::undo::{born, log_name, nonce, now, sample, Header, Kind, Log, Record, Rhythm, FIRST, MOST_DATA, SAMPLES};
use crc32c::crc32c;
use instar_guest_abi::ErrorCode;
use rustix::fs::{
    fchown, fcntl_getfl, fcntl_setfl, fstat, fsync, ftruncate, openat, unlinkat, AtFlags, Gid, Mode, OFlags, Uid,
};
use rustix::io::retry_on_intr;
use std::ffi::{OsStr, OsString};
use std::fs::File;
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
    /// Where the target is: directory and name.
    place: (Directory, OsString),
    /// The name of the log, and its directory.
    log_name: OsString,
    directory: Directory,
    flushed: OwnedFd,
    /// The log under way to its name.
    new: Option<NewFile>,
    log: File,
    header: Header,
    /// When it said last that this process lives.
    rhythm: Rhythm,
    /// Where the next record goes.
    end: u64,
    sequence: u64,
    /// The ranges that it keeps.
    kept: Kept,
    /// What the commit takes its data from.
    sources: Sources,
    /// Whether a range could not be kept: from then on, nothing may change.
    failed: Option<i32>,
}

/// Where the log of a device lies.
#[derive(Clone, Debug)]
pub struct OfDevice {
    /// The directory that the operator names.
    pub directory: Directory,
    /// What the device is.
    pub identity: DeviceIdentity,
}

impl UndoLog {
    /// Make the log of a target, which has this `name` in this directory. The log has no name until the target is about to
    /// change.
    ///
    /// # Errors
    /// The system's error; or a target of another user, whose log could not be distinguished from a forged one.
    pub fn begin(
        target: &OpenedFile,
        (holder, name): (&Directory, &OsStr),
        device: Option<OfDevice>,
        sources: Sources,
    ) -> Result<Self, Error> {
        let path = &target.path;
        let (directory, own_name, called, subject) = match &device {
            None => (holder, log_name(name), name, [0; 32]),
            Some(OfDevice { directory, identity }) => {
                (directory, identity.log_name(), identity.name.as_os_str(), identity.digest)
            }
        };
        let log_path = directory.path().join(&own_name);
        let cannot = |what: &str, error: &io::Error| Error::io(&log_path, ErrorCode::OpenFailed, what, error);
        let stat = fstat(target.file.file()).map_err(|errno| cannot("cannot be created", &errno.into()))?;
        let caller = rustix::process::geteuid();
        if !caller.is_root() && caller.as_raw() != stat.st_uid {
            let clause =
                "belongs to somebody else: an undo log counts only if the image's owner or root wrote it, so run this \
                          as one of them, or commit without --atomic";
            return Err(Error::image(path, ErrorCode::PermissionDenied, clause));
        }
        let new = NewFile::begin_beside(&log_path, directory, &own_name, Mode::from_raw_mode(0o600))?;
        let log = new.file().try_clone().map_err(|error| cannot("cannot be created", &error))?;
        // So that the owner can use it, too. Root's counts as well.
        if caller.is_root() && stat.st_uid != 0 {
            let _ = fchown(&log, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let flushed = openat(directory, ".", flags, Mode::empty());
        let flushed = flushed.map_err(|errno| cannot("is in a directory that cannot be opened", &errno.into()))?;
        let file = target.file.file().try_clone().map_err(|error| cannot("cannot be created", &error))?;
        let of_file = Header {
            inode: stat.st_ino,
            device: stat.st_dev,
            born: born(&file),
            changed: (u64::try_from(stat.st_mtime).unwrap_or(0), u32::try_from(stat.st_mtime_nsec).unwrap_or(0)),
            ..Header::default()
        };
        // Of a device, nothing of its node in /dev is its own.
        let of_device = Header { device: stat.st_rdev, subject, ..Header::default() };
        let header = Header {
            nonce: nonce(),
            length: target.length(),
            begun: now(),
            sources: sources.count(),
            name: called.as_bytes().to_vec(),
            ..if device.is_some() { of_device } else { of_file }
        };
        if header.encode().is_none() {
            return Err(Error::image(path, ErrorCode::OpenFailed, "has a name that is too long for an undo log"));
        }
        Ok(Self {
            path: path.clone(),
            target: file,
            identity: target.identity,
            place: (holder.clone(), name.to_owned()),
            log_name: own_name,
            directory: directory.clone(),
            flushed,
            new: Some(new),
            log,
            end: header.first(),
            header,
            rhythm: Rhythm::default(),
            sequence: 0,
            kept: Kept::default(),
            sources,
            failed: None,
        })
    }

    /// The number of sources that it says something of.
    pub fn sources(&self) -> u32 {
        self.sources.count()
    }

    /// Its path, for messages.
    fn log_path(&self) -> PathBuf {
        self.directory.path().join(&self.log_name)
    }

    /// Whether it has its name, so that the target may be changed.
    fn is_named(&self) -> bool {
        self.new.is_none()
    }

    /// The reason why the log could not keep a range, if that ended the operation.
    pub fn failure(&self) -> Option<Error> {
        let error = io::Error::from_raw_os_error(self.failed.filter(|&errno| errno != libc::EINTR)?);
        if let Some(source) = self.sources.failed() {
            let what = "cannot be flushed or read, and that comes before the target changes";
            return Some(Error::io(source, ErrorCode::OverlayIo, what, &error));
        }
        Some(Error::io(&self.log_path(), ErrorCode::BackingIo, "what the target holds cannot be kept", &error))
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

    /// Take samples of the target, of which nothing was changed yet.
    fn take_samples(&mut self, device: &dyn Before) -> io::Result<()> {
        for index in 0..SAMPLES {
            let range = sample(index, self.header.length);
            let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
            if device.next_data(range.start, range.end).0 < range.end {
                device.read(range.start, &mut bytes)?;
            }
            if let Some(sum) = self.header.samples.get_mut(index) {
                *sum = crc32c(&bytes);
            }
        }
        Ok(())
    }

    /// Keep ranges durably.
    fn keep(
        &mut self,
        device: &dyn Before,
        ranges: &[Range<u64>],
        go_on: &mut dyn FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let missing = self.kept.missing(ranges, self.header.length);
        let batch = self.sequence;
        missing.iter().try_for_each(|range| self.append(device, range, batch, go_on))?;
        // A target that was written long after the last beat was written by somebody else.
        let new = !self.is_named();
        let flushes = new || !missing.is_empty();
        if flushes {
            self.rhythm.beat_before_flush(&self.log, &self.header.nonce)?;
        } else {
            self.rhythm.beat(&self.log, &self.header.nonce, false)?;
        }
        if new {
            self.take_samples(device)?;
            let says = self.sources.settle(&self.header.nonce)?;
            self.log.write_all_at(&says, FIRST)?;
            self.header.durable = self.sequence;
            self.log.write_all_at(&self.header.encode().unwrap_or_default(), 0)?;
        }
        if flushes {
            flush(&self.log)?;
        }
        if let Some(new) = &mut self.new {
            // A crash before its directory is flushed may lose the name: the target is as it was.
            if let Err(error) = new.publish(true) {
                // It may have the name, and not durably: nothing was changed that it would undo.
                let _ = self.remove(&self.log_path());
                return Err(io::Error::from_raw_os_error(error.errno().unwrap_or(libc::EEXIST)));
            }
            self.new = None;
        }
        missing.iter().for_each(|range| self.kept.note(range));
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
        let (holder, name) = &self.place;
        let found = holder.entry(name);
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
        let name = &self.log_name;
        // Only if it is this one.
        let cannot =
            |errno: rustix::io::Errno| Error::io(log, ErrorCode::BackingIo, "cannot be removed", &errno.into());
        let own = fstat(&self.log).map(|stat| Identity::of(&stat)).map_err(cannot)?;
        let found = self.directory.entry(name);
        if found == Ok(own) {
            unlinkat(&self.directory, name, AtFlags::empty()).map_err(cannot)?;
            // A crash that brings it back brings back an empty one.
            let _ = retry_on_intr(|| fsync(&self.flushed));
        }
        Ok(())
    }

    /// The command that applies the log.
    fn recovery(&self) -> String {
        let target = shell_path(&self.path);
        if self.header.subject == [0; 32] {
            return format!("instar recover {target}");
        }
        format!("instar recover --undo-dir {} {target}", shell_path(self.directory.path()))
    }

    /// Restore the target, and remove the log. Returns the state of the files.
    pub fn undo(&mut self) -> String {
        if !self.is_named() {
            return super::AS_IT_WAS.to_owned();
        }
        if self.end == 0 {
            return format!(
                "the target is complete and the overlay reads as before; `{}` removes what is left of the undo log, and running the \
                 commit again finishes it",
                self.recovery()
            );
        }
        match self.give_back() {
            Ok(()) => super::AS_IT_WAS.to_owned(),
            Err(why) => {
                format!("the target could not be given back what it was ({why}): `{}` does that", self.recovery())
            }
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

    fn alive(&mut self) -> io::Result<()> {
        if self.is_named() {
            self.rhythm.beat(&self.log, &self.header.nonce, false)?;
        }
        Ok(())
    }
}

fn flush(file: &File) -> io::Result<()> {
    Ok(retry_on_intr(|| rustix::fs::fdatasync(file))?)
}

#[cfg(test)]
#[path = "undo_log_tests.rs"]
mod tests;
