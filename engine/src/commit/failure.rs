//! Sentences for commits that the guest, or the virtual machine, ended.

use super::error::CommitError;
use super::state::Changed;
use crate::cli::escape::escape;
use crate::devices::errno_text;
use crate::vm::VmError;
use instar_guest_abi::{ErrorCode, DEVICE_OUTPUT};
use std::path::{Path, PathBuf};

/// Longest text of the guest that is shown, in characters.
const TEXT_MAX: usize = 600;

/// The step at which a commit failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Verifying the overlay.
    Check,
    /// Verifying what will be touched in the backing.
    Plan,
    /// Writing into the backing.
    Write,
    /// Emptying the overlay.
    Empty,
}

impl Step {
    /// The step of this name in a message of the guest.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "check" => Self::Check,
            "plan" => Self::Plan,
            "write" => Self::Write,
            "empty" => Self::Empty,
            _ => return None,
        })
    }

    const fn doing(self) -> &'static str {
        match self {
            Self::Check => "checking the overlay",
            Self::Plan => "planning",
            Self::Write => "writing into the backing",
            Self::Empty => "emptying the overlay",
        }
    }
}

/// A commit that the guest reports as failed.
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
    /// One clause of the guest.
    pub text: String,
    /// Where it failed.
    pub step: Step,
}

/// The names of the images, by device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Slots 0 and up: the overlay, and the ancestors of the backing.
    pub layers: Vec<PathBuf>,
    /// The backing.
    pub backing: PathBuf,
}

impl Names {
    /// The overlay's name.
    #[must_use]
    pub fn overlay(&self) -> &Path {
        self.layers.first().map_or(Path::new(""), PathBuf::as_path)
    }

    fn of(&self, device: u32) -> Option<&Path> {
        if device == DEVICE_OUTPUT {
            return Some(&self.backing);
        }
        self.layers.get(usize::try_from(device).ok()?).map(PathBuf::as_path)
    }
}

/// Which file a failure is about when it names none.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    Overlay,
    Backing,
}

/// What is said about a code: the file, what is wrong, what to do.
enum Sentence {
    /// A failure that a guest can report.
    Guest(About, &'static str, &'static str),
    /// A failure that only the host can see: a guest that reports it is broken.
    HostOnly,
}

const CHECK: &str = "look at it with `qemu-img check`";
const REPORT: &str = "this is a bug: please report it";

fn sentence(code: ErrorCode) -> Sentence {
    use About::{Backing, Overlay};
    use Sentence::{Guest, HostOnly};
    match code {
        ErrorCode::UnsupportedFormat => Guest(Overlay, "cannot be committed", "convert it with `qemu-img convert`"),
        ErrorCode::ExternalDataFile => Guest(Overlay, "has an external data file", "convert it to one without"),
        ErrorCode::LuksUnsupported => Guest(Overlay, "is encrypted", "convert it to an image without encryption"),
        ErrorCode::BackingTooSmall => Guest(Backing, "is too small", "resize it first, with `qemu-img resize`"),
        ErrorCode::OverlayLargerThanBacking => {
            Guest(Overlay, "its virtual size exceeds backing virtual size", "--resize-backing lets the backing grow")
        }
        ErrorCode::HeaderMismatch => {
            Guest(Overlay, "changed while it was looked at", "see who else uses it, and run again")
        }
        ErrorCode::OverlayCorrupt => Guest(Overlay, "is corrupt", CHECK),
        ErrorCode::BackingCorrupt => Guest(Backing, "is corrupt", CHECK),
        ErrorCode::ScratchTooSmall => {
            Guest(Overlay, "needs more memory than the guest has", "use an image with larger clusters")
        }
        ErrorCode::RefcountExhausted => Guest(Backing, "its refcounts cannot count higher", "convert it first"),
        ErrorCode::ParseFailed => Guest(Overlay, "cannot be understood", CHECK),
        ErrorCode::InternalOverflow => Guest(Overlay, "a value is out of range", REPORT),
        ErrorCode::OverlayIo => Guest(Overlay, "input or output failed", "see the kernel log, and run again"),
        ErrorCode::BackingIo => Guest(Backing, "input or output failed", "see the kernel log, and run again"),
        ErrorCode::NoSpace => Guest(Backing, "no space is left", "free some space, and run again"),
        ErrorCode::PluginRefused => Guest(Overlay, "a plugin refused it", "see what its documentation says"),
        ErrorCode::GuestProtocol => Guest(Overlay, "the guest could not work with what it was given", REPORT),
        ErrorCode::NotImplemented => Guest(Overlay, "needs what is not there yet", "convert it first"),
        ErrorCode::Ok
        | ErrorCode::NoBacking
        | ErrorCode::ImageInUse
        | ErrorCode::GuestFault
        | ErrorCode::GuestPanic
        | ErrorCode::GuestStalled
        | ErrorCode::WriteTargetNotAllowed
        | ErrorCode::OverlayNotFound
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
        | ErrorCode::Interrupted => HostOnly,
    }
}

/// The error for a commit that the guest reports as failed.
#[must_use]
pub fn map_commit_error(failure: &GuestFailure, names: &Names, changed: Changed) -> CommitError {
    let (about, what, remedy) = match sentence(failure.code) {
        Sentence::Guest(about, what, remedy) => (about, what, remedy),
        Sentence::HostOnly => {
            let clause = format!(
                "the guest broke the protocol: it reported {}, which is not for a guest to say; {}; {REPORT}",
                failure.code.name(),
                changed.clause()
            );
            return CommitError::image(names.overlay(), ErrorCode::GuestProtocol, clause);
        }
    };
    let default = if about == About::Backing { names.backing.as_path() } else { names.overlay() };
    let path = failure.device.and_then(|device| names.of(device)).unwrap_or(default);
    let mut clause = what.to_owned();
    if !failure.text.is_empty() {
        clause.push_str(": ");
        clause.push_str(&escape(&failure.text.chars().take(TEXT_MAX).collect::<String>()));
    }
    if let Some(offset) = failure.offset {
        clause.push_str(&format!(" (at byte {offset})"));
    }
    if let Some(errno) = i32::try_from(failure.errno).ok().filter(|&errno| errno != 0) {
        clause.push_str(&format!(": {}", errno_text(errno)));
    }
    let doing = failure.step.doing();
    CommitError::image(path, failure.code, format!("{clause}, while {doing}; {}; {remedy}", changed.clause()))
}

/// The error for a guest that did not run, or was ended.
#[must_use]
pub fn map_vm_error(error: &VmError, names: &Names, changed: Changed) -> CommitError {
    let code = error.code();
    if code == ErrorCode::Interrupted {
        let clause = match changed {
            Changed { overlay: false, backing: false } => {
                "nothing was changed, the overlay is intact; running the commit again does it"
            }
            changed => changed.clause(),
        };
        return CommitError::image(names.overlay(), code, format!("stopped by a signal: {clause}"));
    }
    CommitError::image(names.overlay(), code, format!("{error}; {}", changed.clause()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names { layers: vec!["top.qcow2".into(), "root.qcow2".into()], backing: "base.qcow2".into() }
    }

    fn failure(code: ErrorCode) -> GuestFailure {
        let text = "L2 entry 5 points\x1b[2J past the end".to_owned();
        GuestFailure { code, device: None, offset: None, errno: 0, text, step: Step::Check }
    }

    #[test]
    fn every_code_has_a_sentence() {
        for &code in ErrorCode::ALL {
            let error = map_commit_error(&failure(code), &names(), Changed::default());
            let host_only = matches!(sentence(code), Sentence::HostOnly);
            assert_eq!(error.code, if host_only { ErrorCode::GuestProtocol } else { code });
            assert!(error.message.contains("nothing was changed"), "{}", error.message);
            assert!(error.message.starts_with("'top.qcow2': ") || error.message.starts_with("'base.qcow2': "));
            assert!(!error.message.contains(['\n', '\x1b']), "{}", error.message);
        }
    }

    #[test]
    fn place_and_errno_are_named() {
        let failure = GuestFailure {
            device: Some(DEVICE_OUTPUT),
            offset: Some(65536),
            errno: 28,
            text: "write of 512 bytes failed".to_owned(),
            step: Step::Write,
            ..failure(ErrorCode::NoSpace)
        };
        let error = map_commit_error(&failure, &names(), Changed { backing: true, overlay: false });
        assert_eq!(
            error.message,
            "'base.qcow2': no space is left: write of 512 bytes failed (at byte 65536): No space left on device, while \
             writing into the backing; the overlay is intact and reads as before, the backing is partly written; running \
             the commit again finishes it; free some space, and run again"
        );
        let failure = GuestFailure { device: Some(1), errno: 5, step: Step::Empty, ..failure };
        let error = map_commit_error(&failure, &names(), Changed { backing: true, overlay: true });
        assert!(error.message.starts_with("'root.qcow2': "));
        assert!(error.message.contains("the backing is complete"));
        let failure = GuestFailure { device: Some(9), errno: u32::MAX, ..failure };
        assert!(map_commit_error(&failure, &names(), Changed::default()).message.starts_with("'base.qcow2': "));
    }

    #[test]
    fn a_signal_leaves_the_overlay_intact() {
        for changed in [Changed::default(), Changed { backing: true, overlay: false }] {
            let error = map_vm_error(&VmError::Interrupted, &names(), changed);
            assert_eq!(error.code, ErrorCode::Interrupted);
            assert!(error.message.contains("the overlay is intact"));
            assert!(error.message.contains("running the commit again"));
        }
        let error = map_vm_error(&VmError::KvmMissing, &names(), Changed::default());
        assert!(error.message.contains("nothing was changed") && error.message.contains("/dev/kvm"));
    }
}
