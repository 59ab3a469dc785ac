//! The seccomp filter of the guest's process: classic BPF over `struct seccomp_data` (`linux/seccomp.h`, seccomp(2)).

use crate::{ANSWER_SIZE, DOORBELL, RING_SIZE};

/// `struct sock_filter` of `linux/filter.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u16,
    /// How many instructions a comparison that holds skips.
    pub if_true: u8,
    /// And one that does not hold.
    pub if_false: u8,
    /// Its operand.
    pub operand: u32,
}

/// `SECCOMP_RET_ALLOW`.
const ALLOW: u32 = 0x7fff_0000;
/// `SECCOMP_RET_TRAP`: `SIGSYS` instead of the call. The handler reports it and ends the process; nothing else can be done
/// from there, because the signal stays blocked, and another one that is blocked kills.
pub const TRAP: u32 = 0x0003_0000;
/// `AUDIT_ARCH_X86_64`. A call of 32 bits (`int 0x80`) is of another architecture; one of x32 has bit 30 in its number, which
/// is none of the numbers below.
const X86_64: u32 = 0xc000_003e;

/// Offsets into `struct seccomp_data`: the number, the architecture, the halves of arguments 0 and 2.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST: [u32; 2] = [16, 20];
const THIRD: [u32; 2] = [32, 36];

const READ: u32 = 0;
const WRITE: u32 = 1;
const EXIT_GROUP: u32 = 231;

const fn load(offset: u32) -> Instruction {
    // BPF_LD | BPF_W | BPF_ABS
    Instruction { code: 0x20, if_true: 0, if_false: 0, operand: offset }
}

/// Go on if the value that was loaded is this one; else skip to the trap, this many instructions further on.
const fn expect(value: u32, to_trap: u8) -> Instruction {
    // BPF_JMP | BPF_JEQ | BPF_K
    Instruction { code: 0x15, if_true: 0, if_false: to_trap, operand: value }
}

/// Skip this many instructions if the value that was loaded is this one.
const fn skip_if(value: u32, skipped: u8) -> Instruction {
    Instruction { code: 0x15, if_true: skipped, if_false: 0, operand: value }
}

const fn answer(action: u32) -> Instruction {
    // BPF_RET | BPF_K
    Instruction { code: 0x06, if_true: 0, if_false: 0, operand: action }
}

/// The number of instructions.
pub const LENGTH: usize = 19;

/// The filter: `read` of an answer, `write` of a ring, both on the doorbell, and the end of the process. Arguments are compared
/// in all 64 bits.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a descriptor, and a handful of bytes")]
#[must_use]
pub const fn program() -> [Instruction; LENGTH] {
    [
        load(ARCHITECTURE),
        expect(X86_64, 15),
        load(NUMBER),
        skip_if(EXIT_GROUP, 14),
        skip_if(READ, 4),
        expect(WRITE, 11),
        load(THIRD[0]),
        skip_if(RING_SIZE as u32, 3),
        answer(TRAP),
        load(THIRD[0]),
        expect(ANSWER_SIZE as u32, 6),
        load(THIRD[1]),
        expect(0, 4),
        load(FIRST[0]),
        expect(DOORBELL as u32, 2),
        load(FIRST[1]),
        skip_if(0, 1),
        answer(TRAP),
        answer(ALLOW),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel makes of a call, by the rules of classic BPF.
    fn action(architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let word = |offset: u32| match offset {
            NUMBER => number,
            ARCHITECTURE => architecture,
            _ => {
                let argument = arguments[usize::try_from(offset - 16).unwrap_or(0) / 8];
                u32::try_from(if offset.is_multiple_of(8) { argument & 0xffff_ffff } else { argument >> 32 })
                    .unwrap_or(0)
            }
        };
        let (filter, mut at, mut loaded) = (program(), 0, 0);
        loop {
            let Instruction { code, if_true, if_false, operand } = filter[at];
            at += 1;
            match code {
                0x20 => loaded = word(operand),
                0x15 => at += usize::from(if loaded == operand { if_true } else { if_false }),
                0x06 => return operand,
                _ => unreachable!("an instruction of another kind"),
            }
        }
    }

    #[test]
    fn three_calls_are_allowed_and_nothing_beside_them() {
        let bell = u64::try_from(DOORBELL).unwrap_or(0);
        let (ring, answer) = (RING_SIZE as u64, ANSWER_SIZE as u64);
        let call = |number, first, third| action(X86_64, number, [first, 0x1234, third, 0, 0, 0]);
        assert_eq!(call(READ, bell, answer), ALLOW);
        assert_eq!(call(WRITE, bell, ring), ALLOW);
        assert_eq!(call(EXIT_GROUP, 7, 7), ALLOW);
        for first in [0, 3, 5, bell | 1 << 32, u64::MAX] {
            assert_eq!(call(READ, first, answer), TRAP, "read of {first:#x}");
            assert_eq!(call(WRITE, first, ring), TRAP, "write to {first:#x}");
        }
        for third in [0, 1, 2, 8, 4096, 1 | 1 << 32, 8 | 1 << 32, u64::MAX] {
            let allowed = |expected| if third == expected { ALLOW } else { TRAP };
            assert_eq!(call(READ, bell, third), allowed(answer), "read of {third:#x} bytes");
            assert_eq!(call(WRITE, bell, third), allowed(ring), "write of {third:#x} bytes");
        }
        for number in (2..2000).filter(|number| *number != EXIT_GROUP) {
            assert_eq!(call(number, bell, ring), TRAP, "{number}");
        }
        for number in [READ, WRITE, EXIT_GROUP] {
            assert_eq!(call(number | 0x4000_0000, bell, ring), TRAP, "x32 {number}");
            assert_eq!(action(0x4000_0003, number, [bell, 0, ring, 0, 0, 0]), TRAP, "of 32 bits {number}");
        }
    }
}
