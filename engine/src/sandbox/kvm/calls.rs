//! The system calls of a process that runs a virtual machine, besides those of its work.

use crate::confine::Allowed::{Always, OneOf};
use crate::confine::Call;
use kvm_bindings::{kvm_cpuid2, kvm_fpu, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_xcrs};

/// The virtual machine and its watchdog.
pub const CALLS: &[Call] = &[
    (libc::SYS_ioctl, OneOf(1, KVM)),
    (libc::SYS_timer_create, Always),
    (libc::SYS_timer_settime, Always),
    (libc::SYS_timer_delete, Always),
];

/// The requests of the machine and its processor (`linux/kvm.h`).
const KVM: &[u32] = &[
    kvm(NONE, 0x04, 0),                                         // KVM_GET_VCPU_MMAP_SIZE
    kvm(NONE, 0x41, 0),                                         // KVM_CREATE_VCPU
    kvm(WRITE, 0x46, size_of::<kvm_userspace_memory_region>()), // KVM_SET_USER_MEMORY_REGION
    kvm(NONE, 0x80, 0),                                         // KVM_RUN
    kvm(READ, 0x81, size_of::<kvm_regs>()),                     // KVM_GET_REGS
    kvm(WRITE, 0x82, size_of::<kvm_regs>()),                    // KVM_SET_REGS
    kvm(READ, 0x83, size_of::<kvm_sregs>()),                    // KVM_GET_SREGS
    kvm(WRITE, 0x84, size_of::<kvm_sregs>()),                   // KVM_SET_SREGS
    kvm(WRITE, 0x8d, size_of::<kvm_fpu>()),                     // KVM_SET_FPU
    kvm(WRITE, 0x90, size_of::<kvm_cpuid2>()),                  // KVM_SET_CPUID2
    kvm(WRITE, 0xa7, size_of::<kvm_xcrs>()),                    // KVM_SET_XCRS
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
        assert_eq!(kvm(WRITE, 0x90, size_of::<kvm_cpuid2>()), 0x4008_ae90, "KVM_SET_CPUID2");
        assert_eq!(
            kvm(WRITE, 0x46, size_of::<kvm_userspace_memory_region>()),
            0x4020_ae46,
            "KVM_SET_USER_MEMORY_REGION"
        );
        assert_eq!(kvm(READ, 0x83, size_of::<kvm_sregs>()), 0x8138_ae83, "KVM_GET_SREGS");
        // Not every machine comes to these.
        assert!(KVM.contains(&0x8090_ae81), "KVM_GET_REGS");
        assert!(KVM.contains(&0x4188_aea7), "KVM_SET_XCRS");
        assert!(!KVM.contains(&0xae01), "KVM_CREATE_VM: the machine is there before");
    }
}
