//! `--digest`: the SHA-256 of the disk as the overlay's guest sees it, before the first change, and as the target shows
//! it afterwards. The two have to be equal, and the second covers the whole disk, including the parts that the commit
//! did not change.
//!
//! The guest says where the bytes are, by requests that write the whole disk to a device that does not exist; the host
//! reads and hashes them here. A hostile guest can lie, as it can when the host [reads back](super::verify).
//!
//! Hashing zeroes takes as long as hashing data, and an image of some kilobytes can claim a disk of many terabytes, so
//! a long disk that holds next to nothing is refused.

use super::request::CommitRequest;
use super::verdict::Parts;
use super::verify::{unreadable, STEP};
use crate::bytes::Bytes;
use crate::devices::{Cache, Devices};
use crate::error::{Error, Role};
use crate::operation::{taken_space, DevicePaths, GuestFailure};
use crate::sandbox::{BadRequest, BufferAccess, SandboxError};
use instar_guest_abi::{request_status, DeviceRole, ErrorCode, Phase, Request, RequestOp, DEVICE_OUTPUT};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::path::Path;

/// The number of the device to which the disk is "written".
const HASHED: u32 = u32::MAX;
/// Bytes that are hashed at once.
const CHUNK: u64 = 1 << 20;
/// Bytes of a disk that are hashed whatever the images hold: ten minutes' worth.
const LEAST: u64 = 1 << 40;
/// Bytes of the disk for each byte that the images take.
const FOR_EACH: u64 = 16;

/// The digests of a commit. What is serialized is the JSON of `docs/commit.md`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskDigest {
    /// Name of the function.
    pub algorithm: &'static str,
    /// Bytes of the disk that were hashed: all of the overlay's.
    pub length: u64,
    /// Of the disk before the commit, in hexadecimal digits.
    pub before: String,
    /// Of the same bytes of the target afterwards; `None` in a dry run.
    pub after: Option<String>,
}

impl DiskDigest {
    /// Digests of SHA-256.
    #[must_use]
    pub fn sha256(length: u64, before: String, after: Option<String>) -> Self {
        Self { algorithm: "sha256", length, before, after }
    }
}

/// Refuse a disk that is almost empty and would take hours to hash, and a commit whose writes are not durable when they
/// are read again.
///
/// # Errors
/// [`ErrorCode::BadUsage`], [`ErrorCode::UnsupportedFormat`].
pub fn admit(request: &CommitRequest, parts: &Parts<'_, '_>) -> Result<(), Error> {
    if request.cache == Cache::Unsafe {
        let message = "--digest reads what is durable, and -t unsafe flushes nothing: use another mode";
        return Err(Error::new(ErrorCode::BadUsage, message));
    }
    let length = parts.overlay.facts.virtual_size;
    let images = parts.merged().chain([parts.backing]).chain(parts.ancestors.iter().copied());
    // A block device holds as much as it is long.
    let taken = images.map(|image| taken_space(image).unwrap_or(image.facts.file_length)).fold(0, u64::saturating_add);
    let longest = LEAST.max(taken.saturating_mul(FOR_EACH));
    if length > longest {
        let clause = format!(
            "has a disk of {} and next to nothing on it, and --digest hashes zeroes as well: up to {} of a disk that takes {} are \
             hashed; leave out --digest",
            Bytes(length),
            Bytes(longest),
            Bytes(taken)
        );
        return Err(Error::image(&parts.overlay.opened.path, ErrorCode::UnsupportedFormat, clause));
    }
    Ok(())
}

/// The disk, as far as it is hashed.
struct Hashing {
    state: Sha256,
    /// The next guest byte to hash.
    next: u64,
    /// Whether the target is hashed, and not the overlay.
    after: bool,
}

/// The digests, as far as they are known.
#[derive(Default)]
pub struct Digests {
    /// The devices of the target's own files.
    target: Vec<u32>,
    /// Bytes of the disk.
    length: u64,
    current: Option<Hashing>,
    before: Option<String>,
    after: Option<String>,
    buffer: Vec<u8>,
    /// The reason why a file could not be read, for which the host ended the guest.
    failure: Option<GuestFailure>,
}

impl Digests {
    /// Prepare the digests of a disk of `length` bytes.
    #[must_use]
    pub fn new(paths: &DevicePaths, length: u64) -> Self {
        Self { target: paths.target().collect(), length, ..Self::default() }
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether this request belongs to the disk that is hashed.
    #[must_use]
    pub fn concerns(request: &Request) -> bool {
        request.device == HASHED
    }

    /// Begin to hash a disk.
    ///
    /// # Errors
    /// A beginning at an impossible time.
    pub fn begin(&mut self, devices: &Devices, after: bool) -> Result<(), BadRequest> {
        let fits = match after {
            false => self.before.is_none() && devices.phase() == Phase::Inspect && !devices.any_changed(),
            true => {
                let flushed = devices.unflushed(|part| part == DeviceRole::Target).is_none();
                self.before.is_some() && self.after.is_none() && devices.phase() == Phase::Target && flushed
            }
        };
        if !fits || self.current.is_some() {
            return Err(BadRequest("a disk is hashed when it makes no sense".to_owned()));
        }
        if after {
            devices.evict_page_cache(self.target.iter().copied());
        }
        self.current = Some(Hashing { state: Sha256::new(), next: 0, after });
        self.end_if_complete()
    }

    /// Hash the bytes that these requests write.
    ///
    /// # Errors
    /// An impossible request, and the events that end the guest: a file that cannot be read, a digest that differs.
    pub fn take(
        &mut self,
        devices: &mut Devices,
        memory: &dyn BufferAccess,
        requests: &mut [Request],
    ) -> Result<(), BadRequest> {
        for request in requests {
            let senseless = || BadRequest(format!("bytes to be hashed that make no sense: {request:?}"));
            let Some(hashing) = &self.current else { return Err(senseless()) };
            let end = request.offset.checked_add(request.length).filter(|&end| end <= self.length);
            let fits = Self::concerns(request) && request.offset == hashing.next && request.length > 0;
            let (Some(end), true) = (end, fits) else { return Err(senseless()) };
            match RequestOp::from_u32(request.op) {
                Some(RequestOp::Zero) => self.zeroes(devices, request.length)?,
                Some(RequestOp::Write) => {
                    let slice = memory.heap_slice(request.buffer, request.length).ok_or_else(senseless)?;
                    self.buffer.resize(slice.len(), 0);
                    slice.copy_to(&mut self.buffer[..]);
                    self.moved(devices, request.length)?;
                }
                Some(RequestOp::Copy) => {
                    let source = request.src_offset.checked_add(request.length);
                    if devices.device(request.src_device).is_none() || source.is_none() {
                        return Err(senseless());
                    }
                    self.copied(devices, request.src_device, request.src_offset, request.length)?;
                }
                _ => return Err(senseless()),
            }
            request.status = request_status::OK;
            if let Some(hashing) = &mut self.current {
                hashing.next = end;
            }
            self.end_if_complete()?;
        }
        Ok(())
    }

    /// Hash plain bytes of a device; its holes count as zeroes and are not read.
    fn copied(&mut self, devices: &mut Devices, number: u32, from: u64, length: u64) -> Result<(), BadRequest> {
        let end = from.saturating_add(length);
        let mut at = from;
        while at < end {
            let Some(device) = devices.device(number) else { break };
            let (data, hole) = device.next_data(at, end);
            if data > at {
                let zeroes = data.min(end) - at;
                self.zeroes(devices, zeroes)?;
                at += zeroes;
                continue;
            }
            let piece = devices.pace_mut().piece(CHUNK).min(hole.clamp(at + 1, end) - at);
            self.buffer.resize(usize::try_from(piece).unwrap_or(0), 0);
            let Some(device) = devices.device(number) else { break };
            if let Err(error) = device.read_padded(at, &mut self.buffer) {
                self.failure = Some(unreadable(number, at, &error));
                return Err(BadRequest("what is to be hashed cannot be read".to_owned()));
            }
            self.moved(devices, piece)?;
            at += piece;
        }
        Ok(())
    }

    /// Hash the content of the buffer.
    fn moved(&mut self, devices: &mut Devices, length: u64) -> Result<(), BadRequest> {
        if let Some(hashing) = &mut self.current {
            hashing.state.update(&self.buffer);
        }
        let moved = devices.pace_mut().go_on().and_then(|()| devices.pace_mut().moved(length));
        moved.map_err(|_| self.interrupted())
    }

    /// Hash zeroes, which are not read.
    fn zeroes(&mut self, devices: &mut Devices, length: u64) -> Result<(), BadRequest> {
        let most = usize::try_from(length.min(CHUNK)).unwrap_or(0);
        self.buffer.clear();
        self.buffer.resize(most, 0);
        let mut left = length;
        while left > 0 {
            let piece = usize::try_from(left).unwrap_or(most).min(most);
            if let Some(hashing) = &mut self.current {
                hashing.state.update(&self.buffer[..piece]);
            }
            devices.pace_mut().go_on().map_err(|_| self.interrupted())?;
            devices.pace_mut().passed(piece as u64);
            left -= piece as u64;
        }
        Ok(())
    }

    fn interrupted(&mut self) -> BadRequest {
        self.failure = Some(GuestFailure::of_machine(&SandboxError::Interrupted));
        BadRequest("hashing was interrupted".to_owned())
    }

    /// Finish the digest, once all of the disk is hashed.
    fn end_if_complete(&mut self) -> Result<(), BadRequest> {
        let Some(Hashing { state, after, .. }) = self.current.take_if(|hashing| hashing.next == self.length) else {
            return Ok(());
        };
        let digest = state.finalize().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        if !after {
            self.before = Some(digest);
            return Ok(());
        }
        let differs = self.before.as_ref() != Some(&digest);
        self.after = Some(digest);
        match differs {
            true => Err(BadRequest("the target shows another disk".to_owned())),
            false => Ok(()),
        }
    }

    /// Whether the disk was hashed before the first change.
    ///
    /// # Errors
    /// If it was not.
    pub fn check_before(&self) -> Result<(), BadRequest> {
        match &self.before {
            Some(_) => Ok(()),
            None => Err(BadRequest("a change was announced before the disk was hashed".to_owned())),
        }
    }

    /// Whether the target shows the same disk. Nothing that depends on the target may change before.
    ///
    /// # Errors
    /// If it was not.
    pub fn check_after(&self) -> Result<(), BadRequest> {
        match self.before.is_some() && self.before == self.after {
            true => Ok(()),
            false => Err(BadRequest("the target was not hashed before the next change".to_owned())),
        }
    }

    /// The digests, as far as they are known.
    #[must_use]
    pub fn found(&self) -> Option<DiskDigest> {
        let before = self.before.clone()?;
        Some(DiskDigest::sha256(self.length, before, self.after.clone()))
    }

    /// The line that names the file, if the commit ended here. `kept` describes the state of the files, unless the
    /// target stays as it was written.
    #[must_use]
    pub fn error(&self, paths: &DevicePaths, kept: Option<&str>) -> Option<Error> {
        if let Some(failure) = &self.failure {
            let state = match &self.before {
                None => "nothing was changed",
                Some(_) => kept.unwrap_or("nothing but the target was changed: the overlay still holds everything"),
            };
            return Some(failure.error(paths, Some(state)));
        }
        let (before, after) = (self.before.as_ref()?, self.after.as_ref()?);
        if before == after {
            return None;
        }
        let state = kept.unwrap_or("the overlay still holds everything, and the target must not be used");
        let clause = format!(
            "does not show the disk that its overlay showed: SHA-256 {after} instead of {before}; {state}: find out what is wrong \
             with its disk (the kernel's log may say), and run the commit again"
        );
        let target = paths.get(DEVICE_OUTPUT).unwrap_or(Path::new(""));
        Some(Error::image(target, ErrorCode::BackingIo, clause).in_role(Role::Backing).in_step(STEP))
    }
}

#[cfg(test)]
#[path = "digest_tests.rs"]
mod tests;
