//! A virtual machine, from the KVM device to the moment before its first instruction.

use super::error::VmError;
use super::layout::{self, Layout};
use super::memory::GuestRam;
use super::spec::{VmReport, VmSpec};
use super::vcpu;
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
    /// [`VmError::KvmMissing`], [`VmError::KvmPermission`] or [`VmError::KvmUnusable`].
    pub fn open() -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT => VmError::KvmMissing,
            errno @ (libc::EACCES | libc::EPERM) => VmError::KvmPermission { errno },
            errno => VmError::unusable("opening /dev/kvm", errno),
        })?;
        if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
            return Err(VmError::unusable("asking /dev/kvm for its version", 0));
        }
        Ok(Self(kvm))
    }
}

/// A virtual machine that is ready to run.
pub struct Vm {
    // In the order in which they are to be dropped: the memory last.
    pub(super) vcpu: VcpuFd,
    _vm: VmFd,
    pub(super) ram: GuestRam,
    pub(super) layout: Layout,
    pub(super) stall_limit: Duration,
    pub(super) message_limit: u64,
    pub(super) report: VmReport,
}

impl Vm {
    /// Create the machine that `spec` describes, with everything loaded.
    ///
    /// # Errors
    /// [`VmError::KvmUnusable`] naming what KVM refused; [`VmError::ModuleInvalid`].
    pub fn new(kvm: &KvmDevice, spec: &VmSpec<'_>) -> Result<Self, VmError> {
        let failed = |what: &'static str| move |e: kvm_ioctls::Error| VmError::unusable(what, e.errno());
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
        let report = VmReport { time_create: started.elapsed(), time_load, ..VmReport::default() };
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
fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    const TRIES: u32 = 100;
    for _ in 1..TRIES {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => return other.map_err(|e| VmError::unusable("KVM_CREATE_VM", e.errno())),
        }
    }
    Err(VmError::unusable("KVM_CREATE_VM", libc::EINTR))
}
