//! What the virtual processor can do: a choice of what this one can, for a program in ring 3 without an operating system.
//!
//! `KVM_GET_SUPPORTED_CPUID` would say what KVM knows of, in about seventy leaves. Each costs the kernel one `cpuid`, which inside
//! of a virtual machine is an exit of its own: together a quarter of a millisecond. The guest needs seven.

use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};
use std::arch::x86_64::__cpuid_count;

/// Leaf 1, EDX: FPU, TSC, MSR, PAE, CX8, CMOV, CLFLUSH, MMX, FXSR, SSE, SSE2. A 64-bit guest cannot do without them.
const BASE: u32 = 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 15 | 1 << 19 | 1 << 23 | 1 << 24 | 1 << 25 | 1 << 26;
/// Leaf 1, ECX: SSE3, PCLMULQDQ, SSSE3, FMA, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, AVX, F16C.
const EXTENSIONS: u32 = 1
    | 1 << 1
    | 1 << 9
    | 1 << 12
    | 1 << 13
    | 1 << 19
    | 1 << 20
    | 1 << 22
    | 1 << 23
    | 1 << 25
    | XSAVE
    | 1 << 28
    | 1 << 29;
const XSAVE: u32 = 1 << 26;
/// Leaf 7, EBX: BMI1, AVX2, BMI2, ERMS, ADX, SHA.
const MORE_EXTENSIONS: u32 = 1 << 3 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 19 | 1 << 29;
/// Leaf 7, EBX.
const SMEP: u32 = 1 << 7;
/// Leaf 7, EBX.
const SMAP: u32 = 1 << 20;
/// Leaf 7, ECX.
const UMIP: u32 = 1 << 2;
/// Leaf 0x8000_0001, EDX: NX and long mode.
const LONG_MODE: u32 = 1 << 20 | 1 << 29;
/// Leaf 0x8000_0001, ECX: LAHF in 64-bit mode, LZCNT.
const LONG_EXTENSIONS: u32 = 1 | 1 << 5;
/// x87, SSE and AVX state.
const STATE: u32 = 0b111;

/// A virtual processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    vendor: [u32; 3],
    signature: u32,
    extensions: u32,
    more_extensions: u32,
    /// Supervisor mode neither executes nor reads pages of user mode by mistake.
    pub smep: bool,
    /// As [`smep`](Self::smep), for reads.
    pub smap: bool,
    /// Ring 3 cannot ask where the descriptor tables are.
    pub umip: bool,
    /// State components that XCR0 may enable.
    pub state: u32,
    long_extensions: u32,
    address_sizes: u32,
}

impl Processor {
    /// What this processor can do of what a guest may use.
    pub fn of_this_machine() -> Self {
        let most = leaf(0, 0);
        let [signature, _, extensions, _] = leaf(1, 0);
        let [_, more, protection, _] = if most[0] >= 7 { leaf(7, 0) } else { [0; 4] };
        let has_xsave = extensions & XSAVE != 0 && most[0] >= 0xd;
        let state = if has_xsave { leaf(0xd, 0)[0] & STATE } else { 0 };
        Self {
            vendor: [most[1], most[2], most[3]],
            signature,
            extensions: extensions & if has_xsave { EXTENSIONS } else { EXTENSIONS & !XSAVE },
            more_extensions: more & MORE_EXTENSIONS,
            smep: more & SMEP != 0,
            smap: more & SMAP != 0,
            umip: protection & UMIP != 0,
            state,
            long_extensions: leaf(0x8000_0001, 0)[2] & LONG_EXTENSIONS,
            address_sizes: leaf(0x8000_0008, 0)[0] & 0xffff,
        }
    }

    /// The same with less and less of what protects the supervisor's pages, which hold no secret and no code that touches the
    /// guest's: KVM takes the first that it can do itself.
    pub fn with_less_and_less(self) -> [Self; 4] {
        let without_supervisor = Self { smep: false, smap: false, ..self };
        let without_umip = Self { umip: false, ..self };
        [self, without_supervisor, without_umip, Self { umip: false, ..without_supervisor }]
    }

    /// What its `cpuid` instruction answers.
    pub fn cpuid(self) -> Option<CpuId> {
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let protection = flag(self.smep, SMEP) | flag(self.smap, SMAP);
        let [b, c, d] = self.vendor;
        let leaves = [
            (0, [0xd, b, c, d]),
            (1, [self.signature, 0, self.extensions, BASE]),
            (7, [0, self.more_extensions | protection, flag(self.umip, UMIP), 0]),
            (0xd, [self.state, 0, 0, 0]),
            (0x8000_0000, [0x8000_0008, b, c, d]),
            (0x8000_0001, [self.signature, 0, self.long_extensions, LONG_MODE]),
            (0x8000_0008, [self.address_sizes, 0, 0, 0]),
        ];
        let entries = leaves.map(|(function, [eax, ebx, ecx, edx])| {
            let flags = if matches!(function, 7 | 0xd) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
            kvm_cpuid_entry2 { function, flags, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
        });
        CpuId::from_entries(&entries).ok()
    }
}

/// EAX, EBX, ECX and EDX of a leaf.
fn leaf(function: u32, index: u32) -> [u32; 4] {
    // Newer compilers know that it is safe.
    #[allow(unused_unsafe, reason = "Rust 1.90 wants it")]
    // SAFETY: every processor with 64-bit mode has the instruction, which touches nothing but its registers.
    let result = unsafe { __cpuid_count(function, index) };
    [result.eax, result.ebx, result.ecx, result.edx]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The registers of a leaf of the virtual processor.
    fn answer(processor: Processor, function: u32) -> [u32; 4] {
        let cpuid = processor.cpuid().unwrap();
        let entry = *cpuid.as_slice().iter().find(|entry| entry.function == function).unwrap();
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn the_guest_may_use_what_a_program_of_this_machine_may() {
        let processor = Processor::of_this_machine();
        let [_, _, extensions, base] = answer(processor, 1);
        let [_, more, ..] = answer(processor, 7);
        let has = |register: u32, bit: u32| register >> bit & 1 != 0;
        assert!(has(base, 25) && has(base, 26), "SSE and SSE2");
        assert_eq!(has(extensions, 28), std::arch::is_x86_feature_detected!("avx"));
        assert_eq!(has(extensions, 23), std::arch::is_x86_feature_detected!("popcnt"));
        assert_eq!(has(more, 5), std::arch::is_x86_feature_detected!("avx2"));
        assert_eq!(has(more, 8), std::arch::is_x86_feature_detected!("bmi2"));
        assert_eq!(answer(processor, 0xd)[0], processor.state);
        assert_eq!(processor.state & 0b100 != 0, std::arch::is_x86_feature_detected!("avx"), "state of AVX");
    }

    #[test]
    fn nothing_that_a_guest_has_no_use_for_is_offered() {
        let everything = Processor {
            vendor: [u32::MAX; 3],
            signature: u32::MAX,
            extensions: EXTENSIONS,
            more_extensions: MORE_EXTENSIONS,
            smep: true,
            smap: true,
            umip: true,
            state: STATE,
            long_extensions: LONG_EXTENSIONS,
            address_sizes: 0x3030,
        };
        let [_, _, extensions, base] = answer(everything, 1);
        // MONITOR, VMX, x2APIC, TSC deadline, RDRAND, hypervisor; MCE, APIC, MTRR, SYSENTER.
        assert_eq!(extensions & (1 << 3 | 1 << 5 | 1 << 21 | 1 << 24 | 1 << 30 | 1 << 31), 0);
        assert_eq!(base & (1 << 7 | 1 << 9 | 1 << 11 | 1 << 12), 0);
        let [_, _, long, long_base] = answer(everything, 0x8000_0001);
        assert_eq!((long & 1 << 2, long_base & 1 << 11), (0, 0), "SVM and SYSCALL");
    }

    #[test]
    fn what_kvm_refuses_is_left_out_step_by_step() {
        let all = Processor { smep: true, smap: true, umip: true, ..Processor::of_this_machine() };
        let steps = all.with_less_and_less().map(|processor| {
            let [_, more, protection, _] = answer(processor, 7);
            (
                (processor.smep, processor.smap, processor.umip),
                (more & SMEP != 0, more & SMAP != 0, protection & UMIP != 0),
            )
        });
        assert!(steps.iter().all(|(registers, answered)| registers == answered), "{steps:?}");
        let asked = steps.map(|(registers, _)| registers);
        assert_eq!(asked, [(true, true, true), (false, false, true), (true, true, false), (false, false, false)]);
    }
}
