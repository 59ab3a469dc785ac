//! The system calls of a process that runs a virtual machine, besides those of its work.

use crate::confine::Allowed::{Always, OneOf};
use crate::confine::Call;
use kvm_bindings::{kvm_cpuid2, kvm_fpu, kvm_mp_state, kvm_regs, kvm_sregs, kvm_xcrs};

/// The calls for the virtual machine and its watchdog. A vCPU of a worker is made when it is woken for the first time.
pub fn calls(has_workers: bool) -> Vec<Call> {
    let requests = if has_workers { WITH_WORKERS } else { KVM };
    vec![
        (libc::SYS_ioctl, OneOf(1, requests)),
        (libc::SYS_timer_create, Always),
        (libc::SYS_timer_settime, Always),
        (libc::SYS_timer_delete, Always),
    ]
}

/// The requests of a processor that was set up before (`linux/kvm.h`).
const KVM: &[u32] = &[RUN, GET_REGS, SET_REGS, GET_SREGS];

/// The same, and those that make a processor.
const WITH_WORKERS: &[u32] = &[
    RUN,
    GET_REGS,
    SET_REGS,
    GET_SREGS,
    kvm(NONE, 0x04, 0),                          // KVM_GET_VCPU_MMAP_SIZE
    kvm(NONE, 0x41, 0),                          // KVM_CREATE_VCPU
    kvm(WRITE, 0x84, size_of::<kvm_sregs>()),    // KVM_SET_SREGS
    kvm(WRITE, 0x8d, size_of::<kvm_fpu>()),      // KVM_SET_FPU
    kvm(WRITE, 0x90, size_of::<kvm_cpuid2>()),   // KVM_SET_CPUID2
    kvm(WRITE, 0x99, size_of::<kvm_mp_state>()), // KVM_SET_MP_STATE
    kvm(WRITE, 0xa7, size_of::<kvm_xcrs>()),     // KVM_SET_XCRS
];

const RUN: u32 = kvm(NONE, 0x80, 0);
const GET_REGS: u32 = kvm(READ, 0x81, size_of::<kvm_regs>());
const SET_REGS: u32 = kvm(WRITE, 0x82, size_of::<kvm_regs>());
const GET_SREGS: u32 = kvm(READ, 0x83, size_of::<kvm_sregs>());

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
        assert_eq!(WITH_WORKERS[..4], *KVM);
        let made = [0xae04, 0xae41, 0x4138_ae84, 0x41a0_ae8d, 0x4008_ae90, 0x4004_ae99, 0x4188_aea7];
        assert_eq!(WITH_WORKERS[4..], made);
    }
}
