//! What a failure in the guest means for the operator.

use crate::cli::CliError;
use instar_guest_abi::{ErrorCode, DEVICE_OUTPUT};
use instar_guest_protocol::CommitResultMessage;
use std::io;
use std::path::{Path, PathBuf};

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
    /// What the guest reported. A code that is not known is nonsense.
    #[must_use]
    pub fn from_message(message: &CommitResultMessage) -> Self {
        Self {
            code: ErrorCode::from_u32(message.error).unwrap_or(ErrorCode::GuestProtocol),
            device: (message.error_device != u32::MAX).then_some(message.error_device),
            offset: (message.error_offset != u64::MAX).then_some(message.error_offset),
            errno: message.error_errno,
            text: message.error_text.clone(),
            step: message.step.clone(),
        }
    }

    /// A guest that was ended.
    pub fn ended(code: ErrorCode, text: impl Into<String>) -> Self {
        Self { code, device: None, offset: None, errno: 0, text: text.into(), step: String::new() }
    }
}

/// The line for a failure: the file, what is wrong, in which state the files are, what to do. `paths` are those of the
/// slots, the overlay first; `changed` tells whether the guest had begun to change files.
#[must_use]
pub fn map_commit_error(failure: &GuestFailure, paths: &[PathBuf], backing: &Path, changed: bool) -> CliError {
    let overlay = paths.first().map_or(backing, PathBuf::as_path);
    let path = match failure.device {
        Some(DEVICE_OUTPUT) => backing,
        Some(slot) => usize::try_from(slot).ok().and_then(|slot| paths.get(slot)).map_or(overlay, PathBuf::as_path),
        None if side_is_backing(failure.code) => backing,
        None => overlay,
    };
    let mut clause = failure.text.clone();
    if failure.errno != 0 {
        let error = io::Error::from_raw_os_error(i32::try_from(failure.errno).unwrap_or(0));
        clause = format!("{clause}: {error}");
    }
    if let Some(offset) = failure.offset.filter(|_| failure.device.is_some()) {
        clause = format!("{clause} (offset {offset})");
    }
    let state = match failure.step.as_str() {
        "check" | "plan" => "nothing was changed",
        "empty" => "the backing is complete and the overlay reads as before; running the commit again empties it",
        _ if changed => "the overlay is intact, and running the commit again finishes it",
        _ => "nothing was changed",
    };
    let advice = advice(failure.code).map_or(String::new(), |advice| format!("; {advice}"));
    CliError::image(path, failure.code, format!("{clause}; {state}{advice}"))
}

/// Whether a failure without a device is about the backing.
fn side_is_backing(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::BackingCorrupt | ErrorCode::BackingIo | ErrorCode::RefcountExhausted | ErrorCode::BackingTooSmall
    )
}

/// What the operator can do. There is no catch-all arm: a new code has to be thought about here.
fn advice(code: ErrorCode) -> Option<&'static str> {
    match code {
        ErrorCode::OverlayCorrupt | ErrorCode::BackingCorrupt => Some("look at it with `qemu-img check`"),
        ErrorCode::HeaderMismatch => Some("make sure that nothing else writes to it, and try again"),
        ErrorCode::ScratchTooSmall => Some("its metadata does not fit into the sandbox: commit a smaller image"),
        ErrorCode::RefcountExhausted => Some("convert the backing to larger clusters or wider refcounts"),
        ErrorCode::NoSpace => Some("free space on its file system"),
        ErrorCode::OverlayIo | ErrorCode::BackingIo => Some("check the storage below it"),
        ErrorCode::GuestFault
        | ErrorCode::GuestPanic
        | ErrorCode::GuestStalled
        | ErrorCode::GuestProtocol
        | ErrorCode::InternalOverflow => Some("please report this with the two images, or their metadata"),
        ErrorCode::KvmMissing | ErrorCode::KvmPermission | ErrorCode::KvmUnusable => None,
        ErrorCode::BackingTooSmall | ErrorCode::OverlayLargerThanBacking => Some("grow the backing first"),
        ErrorCode::Ok
        | ErrorCode::UnsupportedFormat
        | ErrorCode::NoBacking
        | ErrorCode::ExternalDataFile
        | ErrorCode::LuksUnsupported
        | ErrorCode::ParseFailed
        | ErrorCode::ImageInUse
        | ErrorCode::PluginRefused
        | ErrorCode::WriteTargetNotAllowed
        | ErrorCode::OverlayNotFound
        | ErrorCode::BackingNotFound
        | ErrorCode::NotInChain
        | ErrorCode::ChainTooDeep
        | ErrorCode::ChainLoop
        | ErrorCode::NotImplemented
        | ErrorCode::PluginUnavailable
        | ErrorCode::FormatMismatch
        | ErrorCode::OpenFailed
        | ErrorCode::Interrupted => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let paths = [PathBuf::from("over\nlay"), PathBuf::from("below")];
        for &code in ErrorCode::ALL {
            for device in [None, Some(0), Some(1), Some(DEVICE_OUTPUT), Some(77)] {
                let error = map_commit_error(&failure(code, device, "write"), &paths, Path::new("base"), true);
                assert_eq!(error.code, code);
                assert!(!error.message.contains('\n'), "{}", error.message);
                let named = ["over", "below", "base"].iter().any(|name| error.message.contains(name));
                assert!(named, "{}", error.message);
            }
        }
    }

    #[test]
    fn the_line_names_device_offset_errno_and_state() {
        let paths = [PathBuf::from("overlay")];
        let line = |device, step, changed| {
            let failure = failure(ErrorCode::NoSpace, Some(device), step);
            map_commit_error(&failure, &paths, Path::new("base"), changed).message
        };
        let written = line(DEVICE_OUTPUT, "write", true);
        for word in ["'base'", "offset 4096", "No space left on device", "overlay is intact", "again finishes"] {
            assert!(written.contains(word), "{written} lacks {word}");
        }
        assert!(line(0, "plan", false).contains("nothing was changed"));
        assert!(line(0, "empty", true).contains("backing is complete"));
    }
}
