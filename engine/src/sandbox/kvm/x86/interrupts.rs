//! Who models the interrupt controller that the guest does not use.

use kvm_bindings::{kvm_enable_cap, KVM_CAP_SPLIT_IRQCHIP};
use kvm_ioctls::VmFd;

/// Have the kernel model the local interrupt controller. The guest cannot reach it: its page is not mapped, and ring 3 reads no
/// model-specific register. But while a processor exists whose controller is left to the program, the kernel runs other code in
/// all virtual machines (`kvm_has_noapic_vcpu`, `arch/x86/kvm/lapic.c`), and patches itself for that, once for each commit and
/// back: a third of a millisecond. A kernel that refuses models none, and all else is the same.
pub fn leave_to_the_kernel(vm: &VmFd) {
    // The first argument: interrupt lines of a controller that the program models. There is none.
    let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..kvm_enable_cap::default() };
    let _ = vm.enable_cap(&split);
}
