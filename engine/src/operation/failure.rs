//! Turning a failure of the guest into an error for the operator.

use super::attach::DevicePaths;
use super::codes::{advice, guest_may_report, is_of_machine, is_of_target};
use crate::error::{Error, Role, TOO_LONG};
use crate::sandbox::SandboxError;
use instar_guest_abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_protocol::FailureMessage;
use std::io;
use std::path::Path;

/// A guest that failed, or was ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFailure {
    /// The kind of failure.
    pub code: ErrorCode,
    /// The device concerned.
    pub device: Option<u32>,
    /// Byte offset on it.
    pub offset: Option<u64>,
    /// errno of the host, or 0.
    pub errno: u32,
    /// One clause.
    pub text: String,
    /// The step of the operation; empty if it is unknown.
    pub step: String,
}

impl GuestFailure {
    /// Take over the report of a guest. A code that is unknown, or that a guest may not report, breaks the protocol.
    #[must_use]
    pub fn reported(message: &FailureMessage) -> Self {
        let code = ErrorCode::from_u32(message.error).filter(|&code| guest_may_report(code));
        Self {
            code: code.unwrap_or(ErrorCode::GuestProtocol),
            device: (message.device != u32::MAX).then_some(message.device),
            offset: (message.offset != u64::MAX).then_some(message.offset),
            errno: message.errno,
            text: message.text.clone(),
            step: message.step.clone(),
        }
    }

    /// Describe a guest that the host ended.
    pub fn ended(code: ErrorCode, text: impl Into<String>) -> Self {
        Self { code, device: None, offset: None, errno: 0, text: text.into(), step: String::new() }
    }

    /// Describe a sandbox that could not run, or ended.
    #[must_use]
    pub fn of_machine(error: &SandboxError) -> Self {
        let ended = Self::ended(error.code(), error.to_string());
        match error {
            SandboxError::LimitExceeded { device, text } => {
                let text = format!("{text}: restore a copy, and keep this image away from tools without a sandbox");
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
            clause = format!("{clause} (at offset {offset})");
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

    /// Make the error: the file, the fault, the `state` of the files, and the remedy. If KVM cannot be used, no file is at
    /// fault, and the error names none.
    #[must_use]
    pub fn error(&self, paths: &DevicePaths, state: Option<&str>) -> Error {
        self.told(paths, state, advice)
    }

    /// Do the same for a check, which must not advise to run a check.
    #[must_use]
    pub fn error_of_check(&self, paths: &DevicePaths, state: Option<&str>) -> Error {
        let is_corrupt = |code| matches!(code, ErrorCode::OverlayCorrupt | ErrorCode::BackingCorrupt);
        self.told(paths, state, |code| advice(code).filter(|_| !is_corrupt(code)))
    }

    fn told(
        &self,
        paths: &DevicePaths,
        state: Option<&str>,
        advice: impl Fn(ErrorCode) -> Option<&'static str>,
    ) -> Error {
        let of_target = self.device.is_some_and(|device| paths.role(device) == Some(Role::Backing));
        let code = match self.code {
            // A driver does not know which image the files are of.
            ErrorCode::OverlayIo if of_target => ErrorCode::BackingIo,
            code => code,
        };
        let either = if is_of_target(code) { DEVICE_OUTPUT } else { paths.own() };
        let clause = self.clause(paths);
        let clause = state.map_or_else(|| clause.clone(), |state| format!("{clause}; {state}"));
        let line = self.with_advice(clause, code, paths, advice(code));
        if is_of_machine(code) {
            return self.context(Error::new(code, line));
        }
        let error = self.context(Error::image(self.path(paths, either), code, line));
        match paths.role(self.device.unwrap_or(either)) {
            Some(role) => error.in_role(role),
            None => error,
        }
    }

    fn with_advice(&self, clause: String, code: ErrorCode, paths: &DevicePaths, advice: Option<&str>) -> String {
        // There is no file system that could get more room; a driver says itself what the device lacks.
        let full_device = code == ErrorCode::NoSpace && self.device.is_some_and(|device| paths.is_block_device(device));
        match (i32::try_from(self.errno), advice) {
            (Ok(libc::EFBIG), _) => format!("{clause}; {TOO_LONG}"),
            (_, Some(advice)) if !full_device => format!("{clause}; {advice}"),
            _ => clause,
        }
    }
}

/// The text of an errno, without the number that Rust appends.
fn errno_text(errno: u32) -> String {
    crate::error::reason(&io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(names: &[(u32, &str)]) -> DevicePaths {
        DevicePaths {
            by_device: names.iter().map(|&(number, name)| (number, name.into())).collect(),
            merged: 1,
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
    fn every_code_becomes_one_line_that_names_a_file_or_the_machine() {
        let paths = paths(&[(0, "over\nlay"), (1, "below"), (DEVICE_OUTPUT, "base")]);
        for &code in ErrorCode::ALL {
            for device in [None, Some(0), Some(1), Some(DEVICE_OUTPUT), Some(77)] {
                let error = failure(code, device, "write").error(&paths, Some("the overlay is intact"));
                // Storage that fails is named after the image that it holds.
                let expected = match (code, device) {
                    (ErrorCode::OverlayIo, Some(DEVICE_OUTPUT)) => ErrorCode::BackingIo,
                    _ => code,
                };
                assert_eq!(error.code, expected);
                assert!(!error.message.contains('\n'), "{}", error.message);
                let named = ["'over\\x0alay'", "'below'", "'base'"].iter().any(|name| error.message.starts_with(name));
                // The machine's fault is no image's.
                assert_eq!(
                    (named, error.path().is_some()),
                    (!is_of_machine(code), !is_of_machine(code)),
                    "{}",
                    error.message
                );
            }
        }
    }

    #[test]
    fn the_line_names_device_offset_errno_and_state() {
        let paths = paths(&[(0, "overlay"), (DEVICE_OUTPUT, "base")]);
        let failure = failure(ErrorCode::NoSpace, Some(DEVICE_OUTPUT), "write");
        let written = failure.error(&paths, Some("the overlay is intact")).message;
        for word in ["'base'", "offset 4096", "No space left on device", "overlay is intact", "make room"] {
            assert!(written.contains(word), "{written} lacks {word}");
        }
        assert!(!written.contains("os error") && !failure.error(&paths, None).message.contains("intact"), "{written}");
        let limited = GuestFailure { errno: libc::EFBIG.unsigned_abs(), code: ErrorCode::BackingIo, ..failure };
        assert!(limited.error(&paths, None).message.contains("ulimit -f"));
    }

    #[test]
    fn a_full_block_device_has_no_file_system_to_make_room_on() {
        let mut paths = paths(&[(0, "overlay"), (DEVICE_OUTPUT, "base")]);
        let full = failure(ErrorCode::NoSpace, Some(DEVICE_OUTPUT), "plan");
        assert!(full.error(&paths, None).message.contains("file system"));
        paths.block_devices.insert(DEVICE_OUTPUT);
        assert!(!full.error(&paths, None).message.contains("file system"));
    }

    #[test]
    fn a_file_of_the_target_is_the_targets() {
        let mut paths = paths(&[(0, "overlay"), (DEVICE_OUTPUT, "base"), (513, "first"), (514, "second")]);
        paths.target_files = 514..515;
        let error = |device| failure(ErrorCode::OverlayIo, Some(device), "write").error(&paths, None);
        assert_eq!((error(513).code, error(514).code), (ErrorCode::OverlayIo, ErrorCode::BackingIo));
        assert!(error(513).message.contains("'first'") && error(514).message.contains("'second'"));
    }

    #[test]
    fn the_first_image_of_what_only_reads_is_the_image() {
        let paths = DevicePaths { merged: 0, ..paths(&[(0, "top"), (1, "below")]) };
        let role = |device| failure(ErrorCode::OverlayCorrupt, device, "").error(&paths, None).role();
        assert_eq!([None, Some(0), Some(1)].map(role), [Role::Image, Role::Image, Role::Ancestor].map(Some));
    }

    #[test]
    fn a_driver_that_breaks_the_interface_is_named() {
        let mut paths = paths(&[(0, "overlay"), (DEVICE_OUTPUT, "base")]);
        paths.drivers.insert(0, "qcow2 7.8.9".to_owned());
        let message = |code| failure(code, Some(0), "plan").error(&paths, None).message;
        assert!(message(ErrorCode::GuestProtocol).contains("the guest module qcow2 7.8.9: "));
        assert!(!message(ErrorCode::OverlayCorrupt).contains("7.8.9"), "the image is to blame");
    }

    #[test]
    fn what_only_the_host_can_see_a_guest_may_not_report() {
        let reported =
            |code: u32| GuestFailure::reported(&FailureMessage { error: code, ..FailureMessage::default() }).code;
        for &code in ErrorCode::ALL {
            assert_eq!(reported(code.number()), if guest_may_report(code) { code } else { ErrorCode::GuestProtocol });
        }
        assert!(!guest_may_report(ErrorCode::ImageInUse) && guest_may_report(ErrorCode::NoSpace));
        assert_eq!(reported(12345), ErrorCode::GuestProtocol);
    }
}
