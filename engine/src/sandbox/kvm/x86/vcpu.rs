//! The vCPU's registers: 64-bit mode at ring 3. IOPL is 0: which ports ring 3 may use is in the I/O bitmap.

use super::processor::Processor;
use super::system;
use crate::sandbox::error::SandboxError;
use instar_guest_abi::{worker_stack_top, PAGE_TABLES_ADDR, STACK_TOP};
use kvm_bindings::{
    kvm_dtable, kvm_fpu, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs, kvm_xcr, kvm_xcrs, KVM_MP_STATE_RUNNABLE,
};
use kvm_ioctls::VcpuFd;

mod cr0 {
    pub const PROTECTED: u64 = 1;
    pub const MONITOR_COPROCESSOR: u64 = 1 << 1;
    pub const EXTENSION_TYPE: u64 = 1 << 4;
    pub const NUMERIC_ERROR: u64 = 1 << 5;
    pub const WRITE_PROTECT: u64 = 1 << 16;
    pub const PAGING: u64 = 1 << 31;
}

mod cr4 {
    pub const PAE: u64 = 1 << 5;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

mod efer {
    pub const LONG_MODE_ENABLE: u64 = 1 << 8;
    pub const LONG_MODE_ACTIVE: u64 = 1 << 10;
    pub const NO_EXECUTE: u64 = 1 << 11;
}

/// Bit 1 is always set.
const RFLAGS: u64 = 1 << 1;
impl Processor {
    fn cr4(self) -> u64 {
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        cr4::PAE
            | cr4::OSFXSR
            | cr4::OSXMMEXCPT
            | flag(self.state != 0, cr4::OSXSAVE)
            | flag(self.smep, cr4::SMEP)
            | flag(self.smap, cr4::SMAP)
            | flag(self.umip, cr4::UMIP)
    }
}

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 3,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..kvm_segment::default()
    }
}

/// Make `vcpu` a processor in 64-bit mode at ring 3: the main one, which is 0, or a worker.
///
/// # Errors
/// [`SandboxError::KvmUnusable`] naming what KVM refused.
pub fn set_up(vcpu: &VcpuFd, processor: u64) -> Result<(), SandboxError> {
    let failed = |what: &'static str| move |e: kvm_ioctls::Error| SandboxError::unusable(what, e.errno());
    let model = choose(vcpu, processor)?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..kvm_fpu::default() };
    vcpu.set_fpu(&fpu).map_err(failed("KVM_SET_FPU"))?;
    if model.state != 0 {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
        xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: u64::from(model.state) };
        vcpu.set_xcrs(&xcrs).map_err(failed("KVM_SET_XCRS"))?;
    }
    Ok(())
}

/// Make `vcpu` start at `entry` with a stack of its own: as the main processor, which is 0, or as a worker.
///
/// # Errors
/// [`SandboxError::KvmUnusable`] naming what KVM refused.
pub fn start_at(vcpu: &VcpuFd, entry: u64, processor: u64) -> Result<(), SandboxError> {
    let failed = |what: &'static str| move |e: kvm_ioctls::Error| SandboxError::unusable(what, e.errno());
    let stack = if processor == 0 { STACK_TOP } else { worker_stack_top(processor) };
    // As after a call: the return address, which is 0 and so faults, lies on the stack.
    let regs = kvm_regs { rip: entry, rsp: stack - 8, rdi: processor, rflags: RFLAGS, ..kvm_regs::default() };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
    if processor != 0 {
        // With an interrupt controller of the kernel's, it would wait for the main processor to start it.
        let running = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        vcpu.set_mp_state(running).map_err(failed("KVM_SET_MP_STATE"))?;
    }
    Ok(())
}

/// Give `vcpu` as much of this machine's processor as KVM can, and put it into 64-bit mode.
fn choose(vcpu: &VcpuFd, number: u64) -> Result<Processor, SandboxError> {
    let failed = |what: &'static str| move |e: kvm_ioctls::Error| SandboxError::unusable(what, e.errno());
    let mut sregs = system_registers(vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?);
    sregs.tr.base = system::task(number);
    let mut refused = SandboxError::unusable("KVM_SET_SREGS", libc::EINVAL);
    for processor in Processor::of_this_machine().with_less_and_less() {
        let cpuid = processor.cpuid().ok_or_else(|| SandboxError::unusable("building a CPUID", 0))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        match vcpu.set_sregs(&kvm_sregs { cr4: processor.cr4(), ..sregs }) {
            Ok(()) => return Ok(processor),
            Err(error) => refused = failed("KVM_SET_SREGS")(error),
        }
    }
    Err(refused)
}

/// The system registers of 64-bit mode at ring 3, but for CR4.
fn system_registers(mut sregs: kvm_sregs) -> kvm_sregs {
    sregs.cr0 = cr0::PROTECTED
        | cr0::MONITOR_COPROCESSOR
        | cr0::EXTENSION_TYPE
        | cr0::NUMERIC_ERROR
        | cr0::WRITE_PROTECT
        | cr0::PAGING;
    sregs.cr3 = PAGE_TABLES_ADDR;
    sregs.efer = efer::LONG_MODE_ENABLE | efer::LONG_MODE_ACTIVE | efer::NO_EXECUTE;
    // Types: code, execute and read, accessed; data, read and write, accessed; 64-bit task, busy.
    sregs.cs = segment(system::USER_CODE, 0b1011, true);
    let data = segment(system::USER_DATA, 0b0011, false);
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: system::TSS,
        limit: u32::from(system::TSS_LIMIT),
        selector: system::TASK,
        type_: 0b1011,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.ldt = kvm_segment { unusable: 1, ..kvm_segment::default() };
    sregs.gdt = kvm_dtable { base: system::GDT, limit: system::GDT_LIMIT, ..kvm_dtable::default() };
    sregs.idt = kvm_dtable { base: system::IDT, limit: system::IDT_LIMIT, ..kvm_dtable::default() };
    sregs
}
