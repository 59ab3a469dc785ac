//! `--verify`: read the written data back from the disk and compare it with the layers, before anything depends on it.
//!
//! The guest says where the bytes are, on both sides; the host reads and compares them here. A guest in an attacker's
//! hands can lie, and could have written anything before. This check finds a disk, a cable, a file system or a driver
//! that did not keep the data.

use super::request::CommitRequest;
use super::verdict::Parts;
use crate::devices::{Cache, Comparison, Devices, Unequal, COMPARED};
use crate::error::{Error, Role};
use crate::operation::{DevicePaths, GuestFailure};
use crate::sandbox::{BadRequest, SandboxError};
use instar_guest_abi::{DeviceRole, ErrorCode, ExtentKind, Phase, DEVICE_OUTPUT};
use instar_guest_protocol::commit::{Pair, Side, Verify};
use std::io;
use std::path::Path;

/// Maximum number of ranges that are compared at once: what was found is counted between two such steps.
const AT_ONCE: usize = 1024;
/// The maximum length of a pair in a message, in bytes.
pub const PAIR_BYTES: u64 = 80;
/// The step in which the target is read back, as the guest names it.
pub(super) const STEP: &str = "verify";

/// Refuse to read back data that nothing makes durable.
///
/// # Errors
/// [`ErrorCode::BadUsage`].
pub fn admit(request: &CommitRequest) -> Result<(), Error> {
    if request.cache == Cache::Unsafe {
        let message = "--verify reads what is durable, and -t unsafe flushes nothing: use another mode";
        return Err(Error::new(ErrorCode::BadUsage, message));
    }
    Ok(())
}

/// The bound on the messages with the pairs of these images, in bytes.
pub fn message_limit(parts: &Parts<'_, '_>) -> u64 {
    let below = std::iter::once(parts.backing).chain(parts.ancestors.iter().copied());
    let images: Vec<_> = parts.merged().chain(below).collect();
    // The committed data lies in pieces of the layers, which may become pieces of the target.
    crate::map::most_runs(&images).saturating_mul(2 * PAIR_BYTES)
}

/// The progress of reading back.
#[derive(Debug, Default)]
pub struct Verification {
    /// The devices of the target's own files.
    target: Vec<u32>,
    begun: bool,
    /// The guest byte up to which the two were compared.
    next: u64,
    /// Guest bytes that were compared, and are equal.
    bytes: u64,
    /// The ranges to compare next.
    parts: Vec<Comparison>,
    /// The first guest byte at which the two differ, for which the host ended the guest.
    differs: Option<u64>,
    /// The reason why a file could not be read, for which the host ended the guest.
    failure: Option<GuestFailure>,
}

/// The reason to end the guest before it has said everything.
enum Stop {
    Differs(u64),
    Unreadable(u32, u64, io::Error),
    /// The operator wants to stop.
    Interrupted,
    /// The guest cannot be believed.
    Senseless,
}

impl From<Unequal> for Stop {
    fn from(unequal: Unequal) -> Self {
        match unequal {
            Unequal::Differs(at) => Self::Differs(at),
            Unequal::Unreadable(device, offset, error) => Self::Unreadable(device, offset, error),
            Unequal::Interrupted => Self::Interrupted,
        }
    }
}

impl Verification {
    /// Make one that has not begun.
    #[must_use]
    pub fn new(paths: &DevicePaths) -> Self {
        Self { target: paths.target().collect(), ..Self::default() }
    }

    /// Guest bytes that were compared, and are equal.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Check that this much was compared. Nothing that depends on the target may change before.
    ///
    /// # Errors
    /// If it was not.
    pub fn check_complete(&self, planned: u64) -> Result<(), BadRequest> {
        if self.begun && self.bytes == planned && self.differs.is_none() && self.failure.is_none() {
            return Ok(());
        }
        let text = format!("{} bytes of {planned} were read back before the next change", self.bytes);
        Err(BadRequest(text))
    }

    /// Take the pairs that the guest found. Returns whether these are the first.
    ///
    /// # Errors
    /// An impossible pair, and the events that end the guest: a difference, or a file that cannot be read.
    pub fn take(&mut self, devices: &mut Devices, told: &Verify, planned: u64) -> Result<bool, BadRequest> {
        if devices.phase() != Phase::Target || devices.unflushed(|part| part == DeviceRole::Target).is_some() {
            return Err(BadRequest("a target is read back that is not complete and flushed".to_owned()));
        }
        if !self.begun {
            self.begun = true;
            devices.evict_page_cache(self.target.iter().copied());
            return if told.pairs.is_empty() {
                Ok(true)
            } else {
                Err(BadRequest("pairs without a beginning".to_owned()))
            };
        }
        for pair in &told.pairs {
            let end = pair.start.checked_add(pair.length);
            let (Some(end), Some(layers), Some(target)) = (end, &pair.layers, &pair.target) else {
                return Err(senseless(pair));
            };
            let fits = pair.start >= self.next && pair.length != 0 && pair.equal <= pair.length;
            if !fits || self.bytes.saturating_add(pair.length) > planned {
                return Err(senseless(pair));
            }
            let compared = self.compare(devices, pair, layers, target);
            self.note(compared, pair)?;
            (self.next, self.bytes) = (end, self.bytes + pair.length);
        }
        let compared = self.compare_parts(devices);
        self.note(compared, &Pair::default())?;
        Ok(false)
    }

    /// What becomes of a guest whose words were compared with this result.
    fn note(&mut self, compared: Result<(), Stop>, pair: &Pair) -> Result<(), BadRequest> {
        let (failure, what) = match compared {
            Ok(()) => return Ok(()),
            Err(Stop::Differs(at)) => {
                self.differs = Some(at);
                return Err(BadRequest("what was read back differs".to_owned()));
            }
            Err(Stop::Senseless) => return Err(senseless(pair)),
            Err(Stop::Unreadable(device, offset, error)) => {
                (unreadable(device, offset, &error), "what was written cannot be read back")
            }
            Err(Stop::Interrupted) => {
                (GuestFailure::of_machine(&SandboxError::Interrupted), "reading back was interrupted")
            }
        };
        self.failure = Some(failure);
        Err(BadRequest(what.to_owned()))
    }

    /// Compare what was put off, so that several ranges are read at a time.
    fn compare_parts(&mut self, devices: &mut Devices) -> Result<(), Stop> {
        let compared = devices.compare(&self.parts);
        self.parts.clear();
        Ok(compared?)
    }

    /// Compare both sides of a pair, or put it off.
    fn compare(&mut self, devices: &mut Devices, pair: &Pair, layers: &Side, target: &Side) -> Result<(), Stop> {
        let sides = [layers, target];
        if sides.into_iter().any(|side| side.kind == ExtentKind::Encoded as u32) {
            // A difference before it is told first.
            self.compare_parts(devices)?;
            return match pair.equal < pair.length {
                true => Err(Stop::Differs(pair.start + pair.equal)),
                false => devices.pace_mut().moved(pair.length).map_err(|_| Stop::Interrupted),
            };
        }
        let places = [place(devices, layers), place(devices, target)];
        let [Ok(layers), Ok(target)] = places else { return Err(Stop::Senseless) };
        // The target is compared with the layers, and not with itself.
        if layers.is_some_and(|(device, _)| self.target.contains(&device)) {
            return Err(Stop::Senseless);
        }
        let places = [layers, target];
        let mut done = 0;
        while done < pair.length {
            let holes = places.map(|place| hole(devices, place, done, pair.length));
            let hole = holes.into_iter().min().unwrap_or(done);
            if hole > done {
                devices.pace_mut().passed(hole - done);
                done = hole;
                continue;
            }
            devices.pace_mut().go_on().map_err(|_| Stop::Interrupted)?;
            let length = devices.pace_mut().piece(COMPARED).min(pair.length - done);
            let at = pair.start.saturating_add(done);
            let sides = places.map(|place| place.map(|(number, offset)| (number, offset.saturating_add(done))));
            self.parts.push(Comparison { at, length, sides });
            done += length;
            if self.parts.len() >= AT_ONCE {
                self.compare_parts(devices)?;
            }
        }
        Ok(())
    }

    /// Why the commit ended here, if it did: the line that names the target. `kept` says what the files are like where the target
    /// is not left as it was written.
    #[must_use]
    pub fn error(&self, paths: &DevicePaths, kept: Option<&str>) -> Option<Error> {
        if let Some(failure) = &self.failure {
            let state = kept.unwrap_or("nothing but the target was changed: the overlay still holds everything");
            return Some(failure.error(paths, Some(state)));
        }
        let at = self.differs?;
        let state = kept.unwrap_or("the overlay still holds everything, and the target must not be used");
        let clause = format!(
            "does not hold what was written to it: reading it back, it differs at guest offset {at}; {state}: find out what is \
             wrong with its disk (the kernel's log may say), and run the commit again"
        );
        let target = paths.get(DEVICE_OUTPUT).unwrap_or(Path::new(""));
        Some(Error::image(target, ErrorCode::BackingIo, clause).in_role(Role::Backing).in_step(STEP))
    }
}

fn senseless(pair: &Pair) -> BadRequest {
    BadRequest(format!("a pair that makes no sense: {pair:?}"))
}

pub(super) fn unreadable(device: u32, offset: u64, error: &io::Error) -> GuestFailure {
    let errno = error.raw_os_error().and_then(|errno| u32::try_from(errno).ok()).unwrap_or(0);
    let failure = GuestFailure::ended(ErrorCode::OverlayIo, "read failed");
    GuestFailure { device: Some(device), offset: Some(offset), errno, step: STEP.to_owned(), ..failure }
}

/// Device and offset of plain bytes; `None` for zeroes. `Err` for a place that does not exist.
fn place(devices: &Devices, side: &Side) -> Result<Option<(u32, u64)>, ()> {
    match ExtentKind::from_u32(side.kind) {
        None if side.kind == 0 => Ok(None),
        Some(ExtentKind::Zero) => Ok(None),
        Some(ExtentKind::Data) if devices.device(side.device).is_some() => Ok(Some((side.device, side.offset))),
        _ => Err(()),
    }
}

/// The byte of a pair, `end` at most, up to which a side is known to be zeroes from `done` on.
fn hole(devices: &Devices, place: Option<(u32, u64)>, done: u64, end: u64) -> u64 {
    let Some((device, offset)) = place else { return end };
    let Some(device) = devices.device(device) else { return done };
    let (data, _) = device.next_data(offset.saturating_add(done), offset.saturating_add(end));
    data.saturating_sub(offset).clamp(done, end)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::devices::Device;
    use crate::sandbox::{BufferAccess, VolatileSlice};
    use instar_guest_abi::Request;
    use std::os::unix::fs::FileExt;

    const OVERLAY: u32 = 0;
    const SIZE: u64 = 1 << 20;

    struct NoMemory;

    impl BufferAccess for NoMemory {
        fn heap_slice(&self, _: u64, _: u64) -> Option<VolatileSlice<'_>> {
            None
        }
    }

    /// An overlay and a target that hold the same, in the phase in which that is compared.
    fn devices() -> Devices {
        let mut devices = Devices::new();
        for (number, part) in [(OVERLAY, DeviceRole::Read), (DEVICE_OUTPUT, DeviceRole::Target)] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
            devices.attach(number, Device::new(file, true, SIZE, SIZE, false).with_role(part));
        }
        devices.enter(Phase::Target).unwrap();
        devices
    }

    fn verification() -> Verification {
        Verification { target: vec![DEVICE_OUTPUT], ..Verification::default() }
    }

    fn data(device: u32, offset: u64) -> Option<Side> {
        Some(Side { kind: ExtentKind::Data as u32, device, offset })
    }

    fn pair(start: u64, length: u64) -> Pair {
        Pair { start, length, layers: data(OVERLAY, start), target: data(DEVICE_OUTPUT, start), equal: 0 }
    }

    fn told(pairs: Vec<Pair>) -> Verify {
        Verify { pairs }
    }

    /// The result of these pairs.
    fn of(pairs: Vec<Pair>) -> (Verification, Result<bool, String>) {
        let (mut found, mut devices) = (verification(), devices());
        assert!(found.take(&mut devices, &told(vec![]), SIZE).unwrap());
        let taken = found.take(&mut devices, &told(pairs), SIZE).map_err(|bad| bad.0);
        (found, taken)
    }

    #[test]
    fn all_that_was_planned_has_to_be_read_back() {
        let (whole, taken) = of(vec![pair(0, 4096), pair(8192, SIZE - 8192)]);
        assert_eq!((taken, whole.bytes()), (Ok(false), SIZE - 4096));
        assert!(whole.check_complete(SIZE - 4096).is_ok());
        assert!(whole.check_complete(SIZE).is_err() && verification().check_complete(0).is_err());
        assert!(whole.error(&DevicePaths::default(), None).is_none());
    }

    #[test]
    fn one_byte_that_differs_is_found() {
        for at in [0, 4096, SIZE - 1] {
            let (mut found, mut devices) = (verification(), devices());
            devices.device(DEVICE_OUTPUT).unwrap().file().write_all_at(&[8], at).unwrap();
            found.take(&mut devices, &told(vec![]), SIZE).unwrap();
            assert!(found.take(&mut devices, &told(vec![pair(0, SIZE)]), SIZE).is_err());
            assert!(found.check_complete(SIZE).is_err() && found.check_complete(0).is_err());
            let error = found.error(&DevicePaths::default(), None).unwrap();
            assert!(error.to_string().contains(&format!("guest offset {at};")), "{error}");
        }
    }

    #[test]
    fn what_was_zeroed_is_read_and_not_remembered() {
        let mut devices = devices();
        devices
            .execute(&NoMemory, &mut [Request::zero(DEVICE_OUTPUT, 0, SIZE), Request::flush(DEVICE_OUTPUT)])
            .unwrap();
        let device = devices.device(DEVICE_OUTPUT).unwrap();
        assert_eq!(device.next_data(0, SIZE), (SIZE, SIZE));
        device.file().write_all_at(&[1], 5000).unwrap();
        let mut found = verification();
        found.take(&mut devices, &told(vec![]), SIZE).unwrap();
        let zeroes = Pair { layers: Some(Side { kind: ExtentKind::Zero as u32, ..Side::default() }), ..pair(0, SIZE) };
        assert!(found.take(&mut devices, &told(vec![zeroes]), SIZE).is_err());
        assert_eq!(found.differs, Some(5000));
    }

    #[test]
    fn what_a_guest_may_not_say() {
        let lies = [
            // The same pair twice, an empty one, one past the end of the disk.
            vec![pair(0, 4096), pair(0, 4096)],
            vec![pair(0, 0)],
            vec![pair(0, SIZE), pair(SIZE, 1)],
            vec![pair(u64::MAX, 2)],
            // The target with itself, with nothing, with what does not exist.
            vec![Pair { layers: data(DEVICE_OUTPUT, 0), ..pair(0, 4096) }],
            vec![Pair { layers: None, ..pair(0, 4096) }],
            vec![Pair { layers: data(77, 0), ..pair(0, 4096) }],
            vec![Pair { target: Some(Side { kind: 9, ..Side::default() }), ..pair(0, 4096) }],
            vec![Pair { equal: 4097, ..pair(0, 4096) }],
        ];
        for lie in lies {
            let (found, taken) = of(lie.clone());
            assert!(taken.is_err() && found.bytes() <= SIZE, "{lie:?}");
        }
        let encoded = Some(Side { kind: ExtentKind::Encoded as u32, ..Side::default() });
        let (found, taken) = of(vec![Pair { layers: encoded, equal: 4095, ..pair(0, 4096) }]);
        assert!(taken.is_err());
        assert_eq!(found.differs, Some(4095));
        let mut early = verification();
        assert!(early.take(&mut Devices::new(), &told(vec![]), SIZE).is_err(), "before the target was written");
        assert!(verification().take(&mut devices(), &told(vec![pair(0, 1)]), SIZE).is_err(), "without a beginning");
    }
}
