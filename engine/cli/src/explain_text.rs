//! What to do about each error code. `docs/errors.md` has the same texts, and a test holds them together.

use instar_guest_abi::ErrorCode;

/// What to do about an error with this code, in one line.
#[must_use]
pub const fn remedy(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::UnsupportedFormat => { "Read which format or feature the message names. `instar plugins` lists the formats. Convert the image to one of them with the tool that made it." }
        ErrorCode::NoBacking => { "A Parallels image records no parent: name it with `-b`. Any other image stands alone: there is nothing to commit." }
        ErrorCode::ExternalDataFile => { "Read what the message says about the data file. `instar info` shows which one the image names, without opening it." }
        ErrorCode::LuksUnsupported => { "instar has no keys. A LUKS container: open it with `cryptsetup open FILE NAME`, and name /dev/mapper/NAME, with `-f raw`, in its place. Any other image: the program that encrypted it makes a copy without encryption; for qcow and qcow2, the refusal names the command." }
        ErrorCode::BackingTooSmall => { "Enlarge the backing (`instar resize`), or commit with `--resize-backing`." }
        ErrorCode::OverlayLargerThanBacking => { "Add `--resize-backing`, so that the backing grows first." }
        ErrorCode::HeaderMismatch => { "Find out which program changes the file, stop it, and run the command again." }
        ErrorCode::OverlayCorrupt => { "See what is wrong with `instar check`; `instar check -r all` mends what has one right answer. Otherwise restore a copy." }
        ErrorCode::BackingCorrupt => { "See what is wrong with `instar check`; `instar check -r all` mends what has one right answer. Write nothing into it before." }
        ErrorCode::ScratchTooSmall => { "Split the work: commit a chain in several steps (`-b` with a nearer ancestor), or rebase images that differ less." }
        ErrorCode::RefcountExhausted => { "Delete internal snapshots of the backing, or copy it into an image with wider refcounts (`instar convert -o refcount_bits=16`)." }
        ErrorCode::ParseFailed => { "The image is damaged or of another program's making: restore a copy. `instar convert --salvage` copies what is left of compressed data." }
        ErrorCode::InternalOverflow => { "This is a bug of instar: report it, and keep the image." }
        ErrorCode::OverlayIo => { "Look at `errno` in the JSON and at the kernel's log. Once the disk works, run the command again." }
        ErrorCode::BackingIo => { "Keep the overlay, which still holds everything. Once the disk works, run the command again." }
        ErrorCode::NoSpace => { "Make room on the backing's file system (`instar commit --dry-run` says how much), and run the command again." }
        ErrorCode::ImageInUse => { "Stop what uses the image, or wait for it with `--wait`. Instead of a commit, a running virtual machine can merge with `block-commit`." }
        ErrorCode::GuestFault => { "The image made the code in the sandbox fail: keep it away from tools without a sandbox, and report it." }
        ErrorCode::GuestPanic => { "The image made the code in the sandbox fail: keep it away from tools without a sandbox, and report it." }
        ErrorCode::GuestStalled => { "If the machine is not overloaded, the image did it: keep it away from tools without a sandbox, and report it." }
        ErrorCode::GuestProtocol => { "The image or a plugin made the code in the sandbox misbehave: keep the image, and report it." }
        ErrorCode::PluginRefused => { "The message is the plugin's, and says what it lacks." }
        ErrorCode::WriteTargetNotAllowed => { "If you trust the image, name the backing with `-b`, or allow its directory with `--allow-backing-dir`." }
        ErrorCode::ImageNotFound => { "Correct the name; a relative one begins at the current directory." }
        ErrorCode::BackingNotFound => { "Put the missing file where the image records it, or record its new name: `instar rebase -u -b NEW -F FMT IMAGE`." }
        ErrorCode::NotInChain => { "`instar info --backing-chain` shows the chain: name one of its images." }
        ErrorCode::ChainTooDeep => { "Merge the chain in steps: name a nearer ancestor with `-b` first." }
        ErrorCode::ChainLoop => { "If the same file was named twice on the command line, name another one. If an image is below itself, record the right backing with `instar rebase -u -b NEW -F FMT IMAGE`." }
        ErrorCode::KvmMissing => { "Hand the device in (`--device /dev/kvm`), load `kvm_amd` or `kvm_intel`, or add `--sandbox process`." }
        ErrorCode::KvmPermission => { "Join the group of `/dev/kvm` (`sudo usermod -aG kvm $USER`, and a new login); a device without one takes a udev rule, `KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\"`. A container needs the device and its group: `--device /dev/kvm --group-add $(stat -c %g /dev/kvm)`, with rootless podman `--group-add keep-groups`. Or add `--sandbox process`, which needs no device: there the kernel's seccomp holds a hostile image, and not the processor." }
        ErrorCode::KvmUnusable => { "`instar doctor` says what failed; `--sandbox process` does without KVM." }
        ErrorCode::NotImplemented => { "Use the vendor's tool for this step, or convert the image to a format that has it." }
        ErrorCode::PluginUnavailable => { "`instar plugins` says which plugins are loaded, and why others are not." }
        ErrorCode::FormatMismatch => { "Omit `-f`, so that instar detects the format, or name the right one." }
        ErrorCode::OpenFailed => { "Look at `errno` in the JSON: the message says what the file was needed for." }
        ErrorCode::Interrupted => { "Run the same command again: it goes on where it stopped." }
        ErrorCode::BadUsage => { "`instar COMMAND --help` lists what the command takes." }
        ErrorCode::OutputFailed => { "The work is done. Give standard output a place that takes the result." }
        ErrorCode::PermissionDenied => { "Run the command as a user who may read and write the file (a dry run needs reading only), or have the permission granted." }
        ErrorCode::ReadOnly => { "Remount the file system, or copy the image to one that can be written." }
        ErrorCode::ParentMismatch => { "The base was changed after the overlay was made: restore the base of that time. The overlay's data belongs to it." }
        ErrorCode::LimitExceeded => { "The image asks for more work than its size justifies: an attack, or damage. `instar check` says more; keep it away from other tools." }
        ErrorCode::SandboxUnusable => { "`instar doctor` says what the kernel or the container refuses, and what to do." }
        ErrorCode::SandboxLost => { "Raise the memory limit, and run the command again, which goes on where it stopped." }
        ErrorCode::BackingShared => { "Give the other images a base of their own, or add the option that the message names if nobody needs them any more." }
        ErrorCode::RecoveryNeeded => { "`instar recover IMAGE` gives the image back what it was; then run the commit again." }
    }
}
