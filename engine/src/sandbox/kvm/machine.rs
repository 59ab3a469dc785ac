//! A virtual machine, from the KVM device to the moment before its first instruction.

use super::layout::{self, Layout};
use super::x86::vcpu;
use crate::sandbox::error::SandboxError;
use crate::sandbox::memory::GuestRam;
use crate::sandbox::program::{Program, Report};
use instar_guest_abi::GUEST_MEMORY_SIZE;
use kvm_bindings::{kvm_userspace_memory_region, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::time::{Duration, Instant};

/// The open KVM device. A process that will confine itself opens it before.
pub struct KvmDevice(Kvm);

impl KvmDevice {
    /// Open `/dev/kvm`.
    ///
    /// # Errors
    /// [`SandboxError::KvmMissing`], [`SandboxError::KvmPermission`] or [`SandboxError::KvmUnusable`].
    pub fn open() -> Result<Self, SandboxError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT => SandboxError::KvmMissing,
            errno @ (libc::EACCES | libc::EPERM) => SandboxError::KvmPermission { errno },
            errno => SandboxError::unusable("opening /dev/kvm", errno),
        })?;
        if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
            return Err(SandboxError::unusable("asking /dev/kvm for its version", 0));
        }
        Ok(Self(kvm))
    }
}

/// A virtual machine that is ready to run.
pub struct Machine {
    // In the order in which they are to be dropped: the memory last.
    pub(super) vcpu: VcpuFd,
    _vm: VmFd,
    pub(super) ram: GuestRam,
    pub(super) layout: Layout,
    pub(super) stall_limit: Duration,
    pub(super) message_limit: u64,
    pub(super) report: Report,
}

impl Machine {
    /// Create the machine that `spec` describes, with everything loaded.
    ///
    /// # Errors
    /// [`SandboxError::KvmUnusable`] naming what KVM refused; [`SandboxError::ModuleInvalid`].
    pub fn new(kvm: &KvmDevice, spec: &Program<'_>) -> Result<Self, SandboxError> {
        let failed = |what: &'static str| move |e: kvm_ioctls::Error| SandboxError::unusable(what, e.errno());
        let started = Instant::now();
        let ram = GuestRam::new()?;
        let layout = layout::fill(&ram, spec)?;
        let time_load = started.elapsed();

        let started = Instant::now();
        let vm = create_vm(&kvm.0)?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: GUEST_MEMORY_SIZE,
            userspace_addr: ram.host_address(),
        };
        // SAFETY: the range is memory that `ram` owns, which lives in the same object as the machine and is
        // dropped after it.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
        let cpuid = kvm.0.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu::set_up(&vcpu, &cpuid, layout.entry)?;
        let report = Report { time_create: started.elapsed(), time_load, ..Report::default() };
        Ok(Self {
            vcpu,
            _vm: vm,
            ram,
            layout,
            stall_limit: spec.stall_limit,
            message_limit: spec.message_limit,
            report,
        })
    }
}

/// `KVM_CREATE_VM` is interrupted by signals, also by those that are ignored later.
fn create_vm(kvm: &Kvm) -> Result<VmFd, SandboxError> {
    const TRIES: u32 = 100;
    for _ in 1..TRIES {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => return other.map_err(|e| SandboxError::unusable("KVM_CREATE_VM", e.errno())),
        }
    }
    Err(SandboxError::unusable("KVM_CREATE_VM", libc::EINTR))
}
