//! A virtual machine, from the KVM device to the moment before its first instruction.

use super::workers::Workers;
use super::x86::pages::PageTables;
use super::x86::{interrupts, system, vcpu};
use crate::sandbox::error::SandboxError;
use crate::sandbox::guest_loop::Guest;
use crate::sandbox::layout;
use crate::sandbox::memory::{GuestRam, LARGE_PAGE};
use crate::sandbox::program::{guest_module, ModuleSpec, Program, Report};
use instar_guest_abi::{GUEST_MEMORY_SIZE, MODULES_ADDR, PAGE_TABLES_ADDR, SYSTEM_ADDR};
use kvm_bindings::{kvm_userspace_memory_region, KVM_API_VERSION};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CORE: ModuleSpec<'static> = guest_module!("core");

/// A virtual machine that runs nothing yet. A process that will confine itself makes it before, so that the confined one needs
/// no right to make machines, memory or processors.
pub struct KvmDevice {
    // In the order in which they are to be dropped: the memory last.
    vcpu: VcpuFd,
    workers: Workers,
    vm: VmFd,
    ram: GuestRam,
    time_create: Duration,
}

impl KvmDevice {
    /// Open `/dev/kvm`, and create a virtual machine: that is what shows that KVM works. It may get `workers` further vCPUs.
    ///
    /// # Errors
    /// [`SandboxError::KvmMissing`], [`SandboxError::KvmPermission`] or [`SandboxError::KvmUnusable`].
    pub fn open(workers: usize) -> Result<Self, SandboxError> {
        let failed = |what: &'static str| move |e: kvm_ioctls::Error| SandboxError::unusable(what, e.errno());
        let started = Instant::now();
        // They take a while to be ready, in which the rest is done.
        let workers = Workers::start(workers);
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT => SandboxError::KvmMissing,
            errno @ (libc::EACCES | libc::EPERM) => SandboxError::KvmPermission { errno },
            errno => SandboxError::unusable("opening /dev/kvm", errno),
        })?;
        if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
            return Err(SandboxError::unusable("asking /dev/kvm for its version", 0));
        }
        let vm = create_vm(&kvm)?;
        interrupts::leave_to_the_kernel(&vm);
        let ram = GuestRam::new().map_err(|_| SandboxError::unusable("mapping 66 MiB of memory", libc::ENOMEM))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: GUEST_MEMORY_SIZE,
            userspace_addr: ram.host_address(),
        };
        // SAFETY: the range is memory that `ram` owns, of which everybody has a part who has a processor of the machine, and
        // drops it after that.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
        vcpu::set_up(&vcpu, 0)?;
        touch(&ram)?;
        workers.expect();
        Ok(Self { vcpu, workers, vm, ram, time_create: started.elapsed() })
    }

    /// Whether it may get further vCPUs.
    pub fn has_workers(&self) -> bool {
        self.workers.count() > 0
    }
}

/// A virtual machine that is ready to run.
pub struct Machine {
    // In the order in which they are to be dropped: the memory last, which workers hold, too.
    pub(super) vcpu: VcpuFd,
    pub(super) workers: Workers,
    pub(super) vm: VmFd,
    pub(super) guest: Arc<Guest>,
    pub(super) report: Report,
}

impl Machine {
    /// Make the machine that `program` describes, with everything loaded.
    ///
    /// # Errors
    /// [`SandboxError::KvmUnusable`] naming what KVM refused; [`SandboxError::ModuleInvalid`].
    pub fn new(device: KvmDevice, program: &Program<'_>) -> Result<Self, SandboxError> {
        let KvmDevice { vcpu, workers, vm, ram, time_create } = device;
        let started = Instant::now();
        let guest = Arc::new(load(ram, program, workers.count())?);
        vcpu::start_at(&vcpu, guest.layout.entry, 0)?;
        let report = Report { sandbox: super::NAME, time_create, time_load: started.elapsed(), ..Report::default() };
        Ok(Self { vcpu, workers, vm, guest, report })
    }
}

/// Have the kernel find the large pages that every program is loaded into, which takes it as long as loading the program does.
fn touch(ram: &GuestRam) -> Result<(), SandboxError> {
    let all = [SYSTEM_ADDR, MODULES_ADDR.next_multiple_of(LARGE_PAGE)].map(|address| ram.write(address, &[0]));
    all.iter().all(|written| *written).then_some(()).ok_or_else(|| SandboxError::unusable("filling guest memory", 0))
}

/// Guest memory with the program, the supervisor's pages and the page tables.
fn load(ram: GuestRam, program: &Program<'_>, workers: usize) -> Result<Guest, SandboxError> {
    let layout = layout::fill(&ram, CORE, workers, program)?;
    let mut tables = PageTables::new();
    for (range, rights) in layout.mappings.iter().chain(&system::MAPPINGS) {
        tables
            .map(range.start, range.end, *rights)
            .ok_or_else(|| SandboxError::unusable("building the page tables", 0))?;
    }
    let written = ram.write(SYSTEM_ADDR, &system::bytes())
        && ram.write(system::TASKS.start, &system::tasks(workers))
        && ram.write(PAGE_TABLES_ADDR, &tables.bytes());
    if !written {
        return Err(SandboxError::unusable("filling guest memory", 0));
    }
    Ok(Guest::new(ram, layout, program))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::x86::pages::walk::walk;
    use super::*;
    use crate::sandbox::rights::Rights;
    use instar_guest_abi::{MAX_WORKERS, PAGE_SIZE, PAGE_TABLES_SIZE};
    use std::ops::Range;

    /// Every page of guest memory with its rights, as the processor sees them, as runs.
    fn runs(ram: &GuestRam) -> Vec<(Range<u64>, Rights)> {
        let mut tables = vec![0; usize::try_from(PAGE_TABLES_SIZE).unwrap()];
        assert!(ram.read(PAGE_TABLES_ADDR, &mut tables));
        let mut runs: Vec<(Range<u64>, Rights)> = Vec::new();
        for page in (0..GUEST_MEMORY_SIZE + (2 << 20)).step_by(4096) {
            let Some((target, rights)) = walk(&tables, page) else { continue };
            assert_eq!(target, page, "identity");
            match runs.last_mut() {
                Some((run, last)) if run.end == page && *last == rights => run.end += PAGE_SIZE,
                _ => runs.push((page..page + PAGE_SIZE, rights)),
            }
        }
        runs
    }

    #[test]
    fn the_page_tables_are_the_layout_and_the_supervisors_pages() {
        let program = Program::new(guest_module!("commit"), vec![], vec![], vec![]);
        let guest = load(GuestRam::new().unwrap(), &program, MAX_WORKERS).unwrap();
        let mut expected = guest.layout.mappings.clone();
        expected.extend([
            (0x1000..0x2000, Rights::SYSTEM_READ),
            (0x2000..0x3000, Rights::SYSTEM_CODE),
            (0x4000..0x5000, Rights::SYSTEM_DATA),
            (0x6000..0x7000, Rights::SYSTEM_READ),
        ]);
        expected.sort_by_key(|(range, _)| range.start);
        assert_eq!(runs(&guest.ram), expected);
    }
}
