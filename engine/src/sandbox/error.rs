//! Why a guest could not run, or was ended.

use instar_guest_abi::ErrorCode;

/// What works without KVM, and what is weaker in it.
pub const OTHER_SANDBOX: &str =
    "or use `--sandbox process`, which needs no KVM and is weaker: the kernel's seccomp keeps an image's code in, not the processor";

/// Why a guest could not run, or was ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SandboxError {
    /// There is no KVM device.
    #[error("no KVM: /dev/kvm does not exist; start a container with the device, or load kvm_intel or kvm_amd: `instar doctor` says which; {OTHER_SANDBOX}")]
    KvmMissing,
    /// The KVM device may not be opened.
    #[error("no permission for KVM: /dev/kvm may not be opened ({}); join the group that owns it; {OTHER_SANDBOX}", errno_text(*errno))]
    KvmPermission {
        /// errno of the open.
        errno: i32,
    },
    /// KVM is there but cannot run a virtual machine.
    #[error("KVM cannot run a virtual machine: {what} failed ({}); `instar doctor` says what to do; {OTHER_SANDBOX}", errno_text(*errno))]
    KvmUnusable {
        /// What failed.
        what: String,
        /// errno, or 0.
        errno: i32,
    },
    /// The process sandbox cannot be used.
    #[error("the process sandbox cannot be used: {what} failed ({}); `instar doctor` says what to do", errno_text(*errno))]
    ProcessUnusable {
        /// What failed.
        what: String,
        /// errno, or 0.
        errno: i32,
    },
    /// The process that the guest runs in is gone, or stands still, and not because of the guest.
    #[error("the process of the sandbox {0}")]
    ProcessLost(String),
    /// Guest memory cannot be filled: a fault of the engine.
    #[error("guest memory cannot be filled: {0}")]
    Layout(&'static str),
    /// The guest made a system call.
    #[error("guest fault: the system call {name} (number {number}{}), rip {rip:#x} ({place})", architecture(*x86_64))]
    SystemCall {
        /// Its number.
        number: u32,
        /// Its name, if it is one of x86-64.
        name: &'static str,
        /// Whether it was made as one of x86-64.
        x86_64: bool,
        /// The instruction behind it.
        rip: u64,
        /// The module and offset that `rip` lies in.
        place: String,
    },
    /// The guest raised a processor fault.
    #[error("guest fault: {name}{}, rip {rip:#x} ({place}), error code {error_code:#x}", at(*address))]
    GuestFault {
        /// Vector number.
        vector: u8,
        /// What the vector means.
        name: &'static str,
        /// For a page fault: the address, and what was tried there.
        address: Option<(u64, &'static str)>,
        /// The instruction.
        rip: u64,
        /// The module and offset that `rip` lies in.
        place: String,
        /// The processor's error code, 0 if the vector has none.
        error_code: u64,
    },
    /// The guest panicked.
    #[error("guest panic: {text}, in {place}")]
    GuestPanic {
        /// What it said.
        text: String,
        /// The module, its version and the offset of the code that panicked.
        place: String,
    },
    /// The guest ran for too long without asking for anything.
    #[error(
        "the guest makes no progress: it ran for {time} ms of processor time without a request, and is in {place}"
    )]
    GuestStalled {
        /// Milliseconds of processor time.
        time: u64,
        /// The module, its version and the offset where it was ended.
        place: String,
    },
    /// The guest waits, and nobody is to answer.
    #[error("the guest makes no progress: it slept for {time} ms without a request, and is in {place}")]
    GuestAsleep {
        /// Milliseconds.
        time: u64,
        /// The module, its version and the offset where it was ended.
        place: String,
    },
    /// The guest broke the protocol.
    #[error("the guest broke the protocol: {0}")]
    GuestProtocol(String),
    /// A module cannot be loaded.
    #[error("guest module {name}: {text}")]
    ModuleInvalid {
        /// The module's name.
        name: String,
        /// One clause.
        text: String,
    },
    /// The guest did work out of proportion to what the images hold.
    #[error("{text}")]
    LimitExceeded {
        /// The device that most of it was about.
        device: u32,
        /// One clause.
        text: String,
    },
    /// The handler asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl SandboxError {
    /// The code that stands for this error in messages and JSON.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::KvmMissing => ErrorCode::KvmMissing,
            Self::KvmPermission { .. } => ErrorCode::KvmPermission,
            Self::KvmUnusable { .. } => ErrorCode::KvmUnusable,
            Self::ProcessUnusable { .. } => ErrorCode::SandboxUnusable,
            Self::ProcessLost(_) => ErrorCode::SandboxLost,
            Self::Layout(_) => ErrorCode::InternalOverflow,
            Self::GuestFault { .. } | Self::SystemCall { .. } => ErrorCode::GuestFault,
            Self::GuestPanic { .. } => ErrorCode::GuestPanic,
            Self::GuestStalled { .. } | Self::GuestAsleep { .. } => ErrorCode::GuestStalled,
            Self::GuestProtocol(_) => ErrorCode::GuestProtocol,
            Self::ModuleInvalid { .. } => ErrorCode::PluginUnavailable,
            Self::LimitExceeded { .. } => ErrorCode::LimitExceeded,
            Self::Interrupted => ErrorCode::Interrupted,
        }
    }

    pub(super) fn unusable(what: impl Into<String>, errno: i32) -> Self {
        Self::KvmUnusable { what: what.into(), errno }
    }

    pub(super) fn protocol(text: impl Into<String>) -> Self {
        Self::GuestProtocol(text.into())
    }
}

fn errno_text(errno: i32) -> String {
    match errno {
        0 => "no errno".to_owned(),
        errno => crate::error::reason(&std::io::Error::from_raw_os_error(errno)),
    }
}

fn architecture(x86_64: bool) -> &'static str {
    if x86_64 {
        ""
    } else {
        ", not as of x86-64"
    }
}

fn at(address: Option<(u64, &'static str)>) -> String {
    address.map_or_else(String::new, |(address, access)| format!(" {access} address {address:#x}"))
}

/// Text of the guest as it may go to a terminal: bounded, without control characters.
pub(super) fn printable(text: &str) -> String {
    const MAX: usize = 2000;
    let mut shown = String::new();
    for character in text.chars().take(MAX) {
        if character.is_control()
            || matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_what_and_where() {
        let fault = SandboxError::GuestFault {
            vector: 14,
            name: "page fault",
            address: Some((0, "writing")),
            rip: 0x10_1234,
            place: "commit+0x1234".to_owned(),
            error_code: 6,
        };
        assert_eq!(
            fault.to_string(),
            "guest fault: page fault writing address 0x0, rip 0x101234 (commit+0x1234), error code 0x6"
        );
        assert!(SandboxError::KvmPermission { errno: 13 }.to_string().contains("ermission denied"));
        assert_eq!(SandboxError::unusable("KVM_RUN", 5).code(), ErrorCode::KvmUnusable);
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable("a\u{1b}[31mb\u{202e}"), "a\\u{1b}[31mb\\u{202e}");
        assert_eq!(printable(&"x".repeat(5000)).len(), 2000);
    }
}
