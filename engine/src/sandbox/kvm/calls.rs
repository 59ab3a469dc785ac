//! The system calls of a process that runs a virtual machine, besides those of its work.

use crate::confine::Allowed::{Always, OneOf};
use crate::confine::Call;
use kvm_bindings::{kvm_regs, kvm_sregs};

/// The virtual machine and its watchdog.
pub const CALLS: &[Call] = &[
    (libc::SYS_ioctl, OneOf(1, KVM)),
    (libc::SYS_timer_create, Always),
    (libc::SYS_timer_settime, Always),
    (libc::SYS_timer_delete, Always),
];

/// The requests of a processor that was set up before (`linux/kvm.h`).
const KVM: &[u32] = &[
    kvm(NONE, 0x80, 0),                      // KVM_RUN
    kvm(READ, 0x81, size_of::<kvm_regs>()),  // KVM_GET_REGS
    kvm(WRITE, 0x82, size_of::<kvm_regs>()), // KVM_SET_REGS
    kvm(READ, 0x83, size_of::<kvm_sregs>()), // KVM_GET_SREGS
];

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

/// A request of KVM as a number (`_IOC` of `asm-generic/ioctl.h`).
const fn kvm(direction: u32, number: u32, size: usize) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "14 bits by design")]
    let size = size as u32;
    direction << 30 | size << 16 | 0xae << 8 | number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!(
            KVM,
            [0xae80, 0x8090_ae81, 0x4090_ae82, 0x8138_ae83],
            "KVM_RUN, and what the registers are, or the general ones are to be"
        );
    }
}
