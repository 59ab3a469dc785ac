//! What a failure in the guest means for the operator.

use super::attach::DevicePaths;
use crate::devices::Devices;
use crate::error::{Error, Role};
use crate::vm::VmError;
use instar_guest_abi::{ErrorCode, Phase, DEVICE_OUTPUT};
use instar_guest_protocol::CommitResultMessage;
use std::io;
use std::path::Path;

/// The overlay's slot.
const OVERLAY: u32 = 0;

/// A commit that failed in the guest, or a guest that was ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFailure {
    /// What kind of failure.
    pub code: ErrorCode,
    /// The device concerned.
    pub device: Option<u32>,
    /// Byte offset on it.
    pub offset: Option<u64>,
    /// errno of the host, or 0.
    pub errno: u32,
    /// One clause.
    pub text: String,
    /// The step: "check", "plan", "write", "empty", or nothing if it is not known.
    pub step: String,
}

impl GuestFailure {
    /// What the guest of a commit reported.
    #[must_use]
    pub fn from_message(message: &CommitResultMessage) -> Self {
        let place = (message.error_device, message.error_offset);
        let reported = Self::reported(message.error, place, message.error_errno, &message.error_text);
        Self { step: message.step.clone(), ..reported }
    }

    /// What a guest reported: code, device and offset (all ones for none), errno, text. A code that is not known, or that
    /// is not for a guest to report, is nonsense.
    #[must_use]
    pub fn reported(code: u32, (device, offset): (u32, u64), errno: u32, text: &str) -> Self {
        let code = ErrorCode::from_u32(code).filter(|&code| guest_may_report(code));
        Self {
            code: code.unwrap_or(ErrorCode::GuestProtocol),
            device: (device != u32::MAX).then_some(device),
            offset: (offset != u64::MAX).then_some(offset),
            errno,
            text: text.to_owned(),
            step: String::new(),
        }
    }

    /// A guest that was ended.
    pub fn ended(code: ErrorCode, text: impl Into<String>) -> Self {
        Self { code, device: None, offset: None, errno: 0, text: text.into(), step: String::new() }
    }

    /// A virtual machine that could not run, or was ended.
    #[must_use]
    pub fn of_machine(error: &VmError) -> Self {
        let ended = Self::ended(error.code(), error.to_string());
        match error {
            VmError::LimitExceeded { device, text } => {
                let text = format!("{text}; commit a copy of it, made with `qemu-img convert`");
                Self { device: Some(*device), text, ..ended }
            }
            _ => ended,
        }
    }

    /// What is wrong, and where in the file.
    fn clause(&self, paths: &DevicePaths) -> String {
        let mut clause = self.text.clone();
        if self.code == ErrorCode::GuestProtocol {
            let driver = self.device.and_then(|device| paths.driver(device));
            clause = driver.map_or(clause.clone(), |driver| format!("the guest module {driver}: {clause}"));
        }
        if self.errno != 0 {
            clause = format!("{clause}: {}", errno_text(self.errno));
        }
        if let Some(offset) = self.offset.filter(|_| self.device.is_some()) {
            clause = format!("{clause} (offset {offset})");
        }
        clause
    }

    /// The same for programs.
    fn context(&self, error: Error) -> Error {
        let errno = i32::try_from(self.errno).unwrap_or(0);
        error.on_device(self.device, self.offset).with_errno(errno).in_step(&self.step)
    }

    /// The file concerned: that of the `usual` device if the failure names none that is known.
    fn path<'p>(&self, paths: &'p DevicePaths, usual: u32) -> &'p Path {
        let named = self.device.and_then(|device| paths.get(device));
        named.or_else(|| paths.get(usual)).unwrap_or(Path::new(""))
    }
}

/// Which files the guest changed, by what the devices did, and not by what the guest says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The backing is complete: what was changed last is the overlay.
    pub overlay: bool,
    /// The backing was changed, or what records of it that it will be.
    pub backing: bool,
}

impl Changed {
    /// What became of these devices.
    #[must_use]
    pub fn of(devices: &Devices) -> Self {
        let changed = devices.any_changed();
        Self { overlay: changed && devices.phase() == Phase::Overlay, backing: changed }
    }

    /// The state of the files in one clause.
    const fn clause(self) -> &'static str {
        match (self.overlay, self.backing) {
            (true, _) => "the backing is complete and the overlay reads as before; running the commit again empties it",
            (false, true) => "the overlay is intact, and running the commit again finishes it",
            (false, false) => "nothing was changed",
        }
    }
}

/// The text of an errno, without the number that Rust appends.
fn errno_text(errno: u32) -> String {
    crate::error::reason(&io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(0)))
}

/// The line for a failure: the file, what is wrong, in which state the files are, what to do.
#[must_use]
pub fn map_commit_error(failure: &GuestFailure, paths: &DevicePaths, changed: Changed) -> Error {
    let in_backing = failure.device.is_some_and(|device| paths.backing().any(|number| number == device));
    let code = match failure.code {
        // A driver does not know which image the files are of.
        ErrorCode::OverlayIo if in_backing => ErrorCode::BackingIo,
        code => code,
    };
    let either = if side_is_backing(code) { DEVICE_OUTPUT } else { OVERLAY };
    let state = format!("{}; {}", failure.clause(paths), changed.clause());
    // There is no file system that could get more room; a driver says itself what the device lacks.
    let full_device = code == ErrorCode::NoSpace && failure.device.is_some_and(|device| paths.is_block_device(device));
    let clause = match i32::try_from(failure.errno) {
        Ok(libc::EFBIG) => format!("{state}; the file may not become so long: raise the limit (`ulimit -f`)"),
        _ if full_device => state,
        _ => with_advice(state, code),
    };
    let error = failure.context(Error::image(failure.path(paths, either), code, clause));
    match paths.role(failure.device.unwrap_or(either)) {
        Some(role) => error.in_role(role),
        None => error,
    }
}

/// The line for a failure of what only reads: the file, what is wrong, what to do.
#[must_use]
pub fn map_read_error(failure: &GuestFailure, paths: &DevicePaths) -> Error {
    let clause = with_advice(failure.clause(paths), failure.code);
    let error = failure.context(Error::image(failure.path(paths, OVERLAY), failure.code, clause));
    match failure.device {
        None | Some(OVERLAY) => error.in_role(Role::Image),
        // Of a map, which has all layers as slots.
        Some(device) if device < DEVICE_OUTPUT => error.in_role(Role::Ancestor),
        Some(_) => error,
    }
}

fn with_advice(clause: String, code: ErrorCode) -> String {
    match advice(code) {
        Some(advice) => format!("{clause}; {advice}"),
        None => clause,
    }
}

/// Whether a failure without a device is about the backing.
fn side_is_backing(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::BackingCorrupt | ErrorCode::BackingIo | ErrorCode::RefcountExhausted | ErrorCode::BackingTooSmall
    )
}

/// Whether a guest can know of such a failure. The others are the host's to find: scripts act upon them.
fn guest_may_report(code: ErrorCode) -> bool {
    match code {
        ErrorCode::UnsupportedFormat
        | ErrorCode::ExternalDataFile
        | ErrorCode::LuksUnsupported
        | ErrorCode::BackingTooSmall
        | ErrorCode::OverlayLargerThanBacking
        | ErrorCode::HeaderMismatch
        | ErrorCode::OverlayCorrupt
        | ErrorCode::BackingCorrupt
        | ErrorCode::ScratchTooSmall
        | ErrorCode::RefcountExhausted
        | ErrorCode::ParseFailed
        | ErrorCode::InternalOverflow
        | ErrorCode::OverlayIo
        | ErrorCode::BackingIo
        | ErrorCode::NoSpace
        | ErrorCode::GuestProtocol
        | ErrorCode::PluginRefused
        | ErrorCode::NotImplemented
        | ErrorCode::ParentMismatch
        | ErrorCode::LimitExceeded => true,
        ErrorCode::NoBacking
        | ErrorCode::ImageInUse
        | ErrorCode::GuestFault
        | ErrorCode::GuestPanic
        | ErrorCode::GuestStalled
        | ErrorCode::WriteTargetNotAllowed
        | ErrorCode::ImageNotFound
        | ErrorCode::BackingNotFound
        | ErrorCode::NotInChain
        | ErrorCode::ChainTooDeep
        | ErrorCode::ChainLoop
        | ErrorCode::KvmMissing
        | ErrorCode::KvmPermission
        | ErrorCode::KvmUnusable
        | ErrorCode::PluginUnavailable
        | ErrorCode::FormatMismatch
        | ErrorCode::OpenFailed
        | ErrorCode::Interrupted
        | ErrorCode::BadUsage
        | ErrorCode::OutputFailed
        | ErrorCode::PermissionDenied
        | ErrorCode::ReadOnly => false,
    }
}

/// What the operator can do. There is no catch-all arm: a new code has to be thought about here.
fn advice(code: ErrorCode) -> Option<&'static str> {
    match code {
        ErrorCode::OverlayCorrupt | ErrorCode::BackingCorrupt => Some("see what is wrong with `instar check`"),
        ErrorCode::HeaderMismatch => Some("make sure that nothing else writes to it, and try again"),
        ErrorCode::ScratchTooSmall => Some("its metadata does not fit into the sandbox: commit a smaller image"),
        ErrorCode::RefcountExhausted => Some("convert the backing to larger clusters or wider refcounts"),
        ErrorCode::NoSpace => Some("make room on its file system"),
        ErrorCode::OverlayIo | ErrorCode::BackingIo => Some("check the storage below it"),
        ErrorCode::GuestFault
        | ErrorCode::GuestPanic
        | ErrorCode::GuestStalled
        | ErrorCode::GuestProtocol
        | ErrorCode::InternalOverflow => Some("please report this with the two images, or their metadata"),
        ErrorCode::KvmMissing | ErrorCode::KvmPermission | ErrorCode::KvmUnusable => None,
        ErrorCode::BackingTooSmall | ErrorCode::OverlayLargerThanBacking => Some("grow the backing first"),
        ErrorCode::UnsupportedFormat
        | ErrorCode::NoBacking
        | ErrorCode::ExternalDataFile
        | ErrorCode::LuksUnsupported
        | ErrorCode::ParseFailed
        | ErrorCode::ImageInUse
        | ErrorCode::PluginRefused
        | ErrorCode::WriteTargetNotAllowed
        | ErrorCode::ImageNotFound
        | ErrorCode::BackingNotFound
        | ErrorCode::NotInChain
        | ErrorCode::ChainTooDeep
        | ErrorCode::ChainLoop
        | ErrorCode::NotImplemented
        | ErrorCode::PluginUnavailable
        | ErrorCode::FormatMismatch
        | ErrorCode::OpenFailed
        | ErrorCode::Interrupted
        | ErrorCode::BadUsage
        | ErrorCode::OutputFailed
        | ErrorCode::PermissionDenied
        | ErrorCode::ReadOnly
        | ErrorCode::ParentMismatch
        | ErrorCode::LimitExceeded => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(names: &[(u32, &str)]) -> DevicePaths {
        DevicePaths {
            by_device: names.iter().map(|&(number, name)| (number, name.into())).collect(),
            ..DevicePaths::default()
        }
    }

    fn failure(code: ErrorCode, device: Option<u32>, step: &str) -> GuestFailure {
        GuestFailure {
            code,
            device,
            offset: Some(4096),
            errno: 28,
            text: "write of 512 bytes failed".into(),
            step: step.into(),
        }
    }

    #[test]
    fn every_code_becomes_one_line_that_names_a_file() {
        let paths = paths(&[(0, "over\nlay"), (1, "below"), (DEVICE_OUTPUT, "base")]);
        for &code in ErrorCode::ALL {
            for device in [None, Some(0), Some(1), Some(DEVICE_OUTPUT), Some(77)] {
                let error = map_commit_error(
                    &failure(code, device, "write"),
                    &paths,
                    Changed { overlay: false, backing: true },
                );
                // Storage that fails is named after the image that it holds.
                let expected = match (code, device) {
                    (ErrorCode::OverlayIo, Some(DEVICE_OUTPUT)) => ErrorCode::BackingIo,
                    _ => code,
                };
                assert_eq!(error.code, expected);
                assert!(!error.message.contains('\n'), "{}", error.message);
                let named = ["over", "below", "base"].iter().any(|name| error.message.contains(name));
                assert!(named, "{}", error.message);
            }
        }
    }

    #[test]
    fn the_line_names_device_offset_errno_and_state() {
        let paths = paths(&[(0, "overlay"), (DEVICE_OUTPUT, "base")]);
        let line = |device, step, overlay, backing| {
            let failure = failure(ErrorCode::NoSpace, Some(device), step);
            map_commit_error(&failure, &paths, Changed { overlay, backing }).message
        };
        let written = line(DEVICE_OUTPUT, "write", false, true);
        for word in ["'base'", "offset 4096", "No space left on device", "overlay is intact", "again finishes"] {
            assert!(written.contains(word), "{written} lacks {word}");
        }
        assert!(!written.contains("os error"), "{written}");
        assert!(line(0, "plan", false, false).contains("nothing was changed"));
        assert!(line(0, "empty", true, true).contains("backing is complete"));
    }

    #[test]
    fn a_full_block_device_has_no_file_system_to_make_room_on() {
        let mut paths = paths(&[(0, "overlay"), (DEVICE_OUTPUT, "base")]);
        let full = failure(ErrorCode::NoSpace, Some(DEVICE_OUTPUT), "plan");
        assert!(map_commit_error(&full, &paths, Changed::default()).message.contains("file system"));
        paths.block_devices.insert(DEVICE_OUTPUT);
        assert!(!map_commit_error(&full, &paths, Changed::default()).message.contains("file system"));
    }

    #[test]
    fn a_file_of_the_backing_is_the_backings() {
        let mut paths = paths(&[(0, "overlay"), (DEVICE_OUTPUT, "base"), (513, "first"), (514, "second")]);
        paths.backing_files = 514..515;
        let error = |device| {
            map_commit_error(&failure(ErrorCode::OverlayIo, Some(device), "write"), &paths, Changed::default())
        };
        assert_eq!((error(513).code, error(514).code), (ErrorCode::OverlayIo, ErrorCode::BackingIo));
        assert!(error(513).message.contains("'first'") && error(514).message.contains("'second'"));
    }

    #[test]
    fn a_driver_that_breaks_the_interface_is_named() {
        let mut paths = paths(&[(0, "overlay"), (DEVICE_OUTPUT, "base")]);
        paths.drivers.insert(0, "qcow2 7.8.9".to_owned());
        let message = |code| map_commit_error(&failure(code, Some(0), "plan"), &paths, Changed::default()).message;
        assert!(message(ErrorCode::GuestProtocol).contains("the guest module qcow2 7.8.9: "));
        assert!(!message(ErrorCode::OverlayCorrupt).contains("7.8.9"), "the image is to blame");
    }

    #[test]
    fn what_only_the_host_can_see_a_guest_may_not_report() {
        for &code in ErrorCode::ALL {
            let message = CommitResultMessage { error: code.number(), ..CommitResultMessage::default() };
            let reported = GuestFailure::from_message(&message).code;
            assert_eq!(reported, if guest_may_report(code) { code } else { ErrorCode::GuestProtocol });
        }
        assert!(!guest_may_report(ErrorCode::ImageInUse) && guest_may_report(ErrorCode::NoSpace));
        let unknown = CommitResultMessage { error: 12345, ..CommitResultMessage::default() };
        assert_eq!(GuestFailure::from_message(&unknown).code, ErrorCode::GuestProtocol);
    }
}
