//! The error codes: who may report each, and the remedy of the operator. There is no catch-all arm, so that a new code needs a
//! decision here.

use instar_guest_abi::ErrorCode;

/// Whether a failure without a device is about the image that is written.
pub fn is_of_target(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::BackingCorrupt | ErrorCode::BackingIo | ErrorCode::RefcountExhausted | ErrorCode::BackingTooSmall
    )
}

/// Whether a failure is about the machine, whatever the images are: the sandbox cannot be used.
pub fn is_of_machine(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::KvmMissing | ErrorCode::KvmPermission | ErrorCode::KvmUnusable | ErrorCode::SandboxUnusable
    )
}

/// Whether a guest can detect such a failure. Only the host may report the others, on which scripts act.
pub fn guest_may_report(code: ErrorCode) -> bool {
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
        | ErrorCode::ReadOnly
        | ErrorCode::SandboxUnusable
        | ErrorCode::SandboxLost
        | ErrorCode::BackingShared
        | ErrorCode::RecoveryNeeded => false,
    }
}

/// Return the remedy of the operator. There is no catch-all arm, so that a new code needs a decision here.
pub fn advice(code: ErrorCode) -> Option<&'static str> {
    match code {
        ErrorCode::OverlayCorrupt | ErrorCode::BackingCorrupt => {
            Some("see what else is wrong with `instar check`, or restore a copy")
        }
        ErrorCode::ParseFailed => Some("`instar convert --salvage` copies everything else"),
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
        ErrorCode::SandboxLost => Some("run the command again"),
        ErrorCode::KvmMissing | ErrorCode::KvmPermission | ErrorCode::KvmUnusable | ErrorCode::SandboxUnusable => None,
        ErrorCode::BackingTooSmall | ErrorCode::OverlayLargerThanBacking => Some("grow the backing first"),
        ErrorCode::UnsupportedFormat
        | ErrorCode::NoBacking
        | ErrorCode::ExternalDataFile
        | ErrorCode::LuksUnsupported
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
        | ErrorCode::LimitExceeded
        | ErrorCode::BackingShared
        | ErrorCode::RecoveryNeeded => None,
    }
}
