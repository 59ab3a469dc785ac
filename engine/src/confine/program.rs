//! Programs of the kernel's packet filter (`linux/filter.h`) that decide about system calls.
//!
//! The kernel checks a program, translates it, and runs it for each call that it cannot decide without arguments: a start waits
//! for the first two, so a program is short. First come the calls that are listed whatever their arguments, one instruction for
//! each, then the others, each with its rules.

use super::calls::Allowed;
use seccompiler::{sock_filter, BpfProgram, SeccompAction};
use std::collections::BTreeMap;

/// The last of the standard descriptors: standard error.
const LAST_STANDARD: u32 = 2;

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const ANY_BIT: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// Where the number of the call is (`struct seccomp_data`, `linux/seccomp.h`).
const NUMBER: u32 = 0;
/// Where the architecture is.
const ARCHITECTURE: u32 = 4;
/// Where the lower half of the first argument is. Each has 8 bytes.
const ARGUMENTS: u32 = 16;
/// `AUDIT_ARCH_X86_64` (`linux/audit.h`).
const X86_64: u32 = 0xc000_003e;

/// Calls in a row that jump to the same instruction: it is at most 255 away.
const ROW: usize = 255;

/// What an argument has to be. The kernel takes each of those that are compared as 32 bits.
#[derive(Clone, Copy, Debug)]
enum Test<'v> {
    OneOf(&'v [u32]),
    Not(u32),
    Above(u32),
    Without(u32),
}

/// The number of an argument, and what it has to be.
type Condition<'v> = (u8, Test<'v>);

impl Allowed {
    /// Call `rule` with the conditions that have to hold, all of them.
    fn with_conditions<T>(&self, rule: impl FnOnce(&[Condition<'_>]) -> T) -> T {
        // A negative descriptor counts as a large number: the kernel refuses it itself.
        let file = |argument| (argument, Test::Above(LAST_STANDARD));
        match *self {
            Self::Always => rule(&[]),
            Self::OneOf(argument, values) => rule(&[(argument, Test::OneOf(values))]),
            Self::First(value) => rule(&[(0, Test::OneOf(&[value]))]),
            Self::FirstAndOneOf(first, argument, values) => {
                rule(&[(0, Test::OneOf(&[first])), (argument, Test::OneOf(values))])
            }
            Self::Except(argument, value) => rule(&[(argument, Test::Not(value))]),
            Self::Without(argument, bits) => rule(&[(argument, Test::Without(bits))]),
            Self::OwnProcess(argument) => rule(&[(argument, Test::OneOf(&[std::process::id()]))]),
            Self::Files(arguments) => rule(&arguments.iter().map(|&argument| file(argument)).collect::<Vec<_>>()),
            Self::FileOneOf(argument, values) => rule(&[file(0), (argument, Test::OneOf(values))]),
            Self::Mapping => rule(&[(2, Test::Without(libc::PROT_EXEC.cast_unsigned())), file(4)]),
        }
    }
}

/// A call that is not in the list meets the action `other`, one that is, `listed`. A call of another architecture's numbering
/// kills the process at once.
///
/// # Errors
/// The rules of a call are too many.
pub(super) fn compile(
    calls: &BTreeMap<i64, Vec<Allowed>>,
    other: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, String> {
    let (other, listed) = (statement(RETURN, other.into()), statement(RETURN, listed.into()));
    let kill = statement(RETURN, SeccompAction::KillProcess.into());
    let mut program = vec![statement(LOAD, ARCHITECTURE), jump(EQUAL, X86_64, 1, 0), kill, statement(LOAD, NUMBER)];
    let number = |call: i64| u32::try_from(call).map_err(|_| format!("{call} is no system call"));
    let (always, others): (Vec<_>, Vec<_>) = calls.iter().partition(|(_, rules)| rules.contains(&Allowed::Always));
    for row in always.chunks(ROW) {
        for (index, (call, _)) in row.iter().enumerate() {
            let left = row.len() - 1 - index;
            // The last of them jumps over what the others jump to.
            program.push(jump(EQUAL, number(**call)?, distance(left)?, u8::from(left == 0)));
        }
        program.push(listed.clone());
    }
    for (call, rules) in others {
        let mut block = Vec::new();
        for rule in rules {
            block.extend(rule.with_conditions(|conditions| matches(conditions, &listed))?);
        }
        block.push(other.clone());
        program.push(jump(EQUAL, number(*call)?, 0, distance(block.len())?));
        program.extend(block);
    }
    program.push(other);
    Ok(program)
}

/// Return `listed` if all these conditions hold, or else go on behind that.
fn matches(conditions: &[Condition<'_>], listed: &sock_filter) -> Result<BpfProgram, String> {
    // Built from its end: how far it is from there decides how far a condition jumps that does not hold.
    let mut reversed = vec![listed.clone()];
    for &(argument, test) in conditions.iter().rev() {
        let out = distance(reversed.len())?;
        match test {
            Test::OneOf([]) => return Err("an argument may have no value at all".to_owned()),
            Test::OneOf(values) => {
                for (left, &value) in values.iter().rev().enumerate() {
                    let out = if left == 0 { out } else { 0 };
                    reversed.push(jump(EQUAL, value, distance(left)?, out));
                }
            }
            Test::Not(value) => reversed.push(jump(EQUAL, value, out, 0)),
            Test::Above(value) => reversed.push(jump(GREATER, value, 0, out)),
            Test::Without(bits) => reversed.push(jump(ANY_BIT, bits, out, 0)),
        }
        reversed.push(statement(LOAD, ARGUMENTS + 8 * u32::from(argument)));
    }
    reversed.reverse();
    Ok(reversed)
}

fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// Compare with `k`, and leave out `jt` instructions if it holds, or else `jf`.
fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// How many instructions a comparison leaves out.
fn distance(instructions: usize) -> Result<u8, String> {
    u8::try_from(instructions).map_err(|_| "a filter jumps over more than 255 instructions".to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::super::calls::{Call, Work};
    use super::*;
    use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch};

    const ALLOW: u32 = 0x7fff_0000;
    const TRAP: u32 = 0x0003_0000;
    const KILL: u32 = 0x8000_0000;

    /// What the kernel is told of a call: `struct seccomp_data`.
    #[derive(Clone, Copy, Debug)]
    struct Asked {
        number: u32,
        architecture: u32,
        arguments: [u64; 6],
    }

    impl Asked {
        fn word(&self, offset: u32) -> u32 {
            let argument = |index: u32| self.arguments[usize::try_from(index).unwrap()];
            match offset {
                0 => self.number,
                4 => self.architecture,
                _ => {
                    let (index, half) = ((offset - 16) / 8, (offset - 16) % 8);
                    u32::try_from(argument(index) >> (8 * half) & 0xffff_ffff).unwrap()
                }
            }
        }
    }

    /// Run a program as the kernel does.
    fn run(program: &BpfProgram, asked: &Asked) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at].clone();
            at += 1;
            let holds = match code {
                LOAD => {
                    accumulator = asked.word(k);
                    continue;
                }
                RETURN => return k,
                // BPF_ALU | BPF_AND | BPF_K and BPF_JMP | BPF_JA, which only the other compiler uses
                0x54 => {
                    accumulator &= k;
                    continue;
                }
                0x05 => {
                    at += usize::try_from(k).unwrap();
                    continue;
                }
                EQUAL => accumulator == k,
                GREATER => accumulator > k,
                ANY_BIT => accumulator & k != 0,
                other => panic!("{other:#x}"),
            };
            at += usize::from(if holds { jt } else { jf });
        }
    }

    /// The same list as seccompiler compiles it.
    fn reference(calls: &BTreeMap<i64, Vec<Allowed>>, other: SeccompAction, listed: SeccompAction) -> BpfProgram {
        let compare = |argument: u8, operator, value: u32| {
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into()).unwrap()
        };
        let rules = |allowed: &Allowed| {
            let file = |argument: u8| compare(argument, SeccompCmpOp::Gt, 2);
            let rules: Vec<Vec<SeccompCondition>> = match *allowed {
                Allowed::Always => vec![],
                Allowed::OneOf(argument, values) => {
                    values.iter().map(|&value| vec![compare(argument, SeccompCmpOp::Eq, value)]).collect()
                }
                Allowed::First(value) => vec![vec![compare(0, SeccompCmpOp::Eq, value)]],
                Allowed::FirstAndOneOf(first, argument, values) => values
                    .iter()
                    .map(|&value| vec![compare(0, SeccompCmpOp::Eq, first), compare(argument, SeccompCmpOp::Eq, value)])
                    .collect(),
                Allowed::Except(argument, value) => vec![vec![compare(argument, SeccompCmpOp::Ne, value)]],
                Allowed::Without(argument, bits) => {
                    vec![vec![compare(argument, SeccompCmpOp::MaskedEq(bits.into()), 0)]]
                }
                Allowed::OwnProcess(argument) => vec![vec![compare(argument, SeccompCmpOp::Eq, std::process::id())]],
                Allowed::Files(arguments) => vec![arguments.iter().map(|&argument| file(argument)).collect()],
                Allowed::FileOneOf(argument, values) => {
                    values.iter().map(|&value| vec![file(0), compare(argument, SeccompCmpOp::Eq, value)]).collect()
                }
                Allowed::Mapping => vec![vec![compare(2, SeccompCmpOp::MaskedEq(4), 0), file(4)]],
            };
            rules.into_iter().map(|conditions| SeccompRule::new(conditions).unwrap())
        };
        let all = calls.iter().map(|(call, allowed)| (*call, allowed.iter().flat_map(rules).collect())).collect();
        SeccompFilter::new(all, other, listed, TargetArch::x86_64).unwrap().try_into().unwrap()
    }

    /// Values that a list makes a difference for, and their neighbors.
    fn values(calls: &BTreeMap<i64, Vec<Allowed>>) -> Vec<u64> {
        let mut all =
            vec![0, 1, 2, 3, 4, 7, u64::from(std::process::id()), u64::MAX, 1 << 32, 1 << 32 | 1, 0xffff_ffff];
        for allowed in calls.values().flatten() {
            allowed.with_conditions(|conditions| {
                for (_, test) in conditions {
                    match *test {
                        Test::OneOf(values) => all.extend(values.iter().map(|&value| u64::from(value))),
                        Test::Not(value) | Test::Above(value) | Test::Without(value) => all.push(value.into()),
                    }
                }
            });
        }
        let near = all.iter().flat_map(|value| [*value, value.wrapping_add(1), value | 5 << 32]).collect::<Vec<_>>();
        let mut near: Vec<u64> = near.into_iter().collect();
        near.sort_unstable();
        near.dedup();
        near
    }

    /// Both programs say the same of every call, with arguments that make a difference.
    fn assert_same(calls: &BTreeMap<i64, Vec<Allowed>>, other: &SeccompAction, listed: &SeccompAction) {
        let ours = compile(calls, other.clone(), listed.clone()).unwrap();
        let theirs = reference(calls, other.clone(), listed.clone());
        assert!(ours.len() * 2 < theirs.len() + 20, "{} instructions, {} before", ours.len(), theirs.len());
        let values = values(calls);
        let mut answers = std::collections::BTreeSet::new();
        for number in (0..470).chain([u32::MAX, 0x4000_0000, 0x4000_0001]) {
            let listed = calls.get(&i64::from(number)).is_some_and(|rules| !rules.contains(&Allowed::Always));
            let few = &values[..3];
            for &one in if listed { &values } else { few } {
                for &another in if listed { &values } else { few } {
                    // Each rule looks at two arguments at most.
                    for arguments in [
                        [one, another, another, another, another, another],
                        [another, another, one, another, another, another],
                        [another, one, another, another, one, another],
                        [one, another, one, another, another, one],
                    ] {
                        for architecture in [X86_64, 0x4000_0003] {
                            let asked = Asked { number, architecture, arguments };
                            let answer = run(&ours, &asked);
                            assert_eq!(answer, run(&theirs, &asked), "{asked:x?}");
                            answers.insert(answer);
                        }
                    }
                }
            }
        }
        assert_eq!(answers.into_iter().collect::<Vec<_>>(), [TRAP, ALLOW, KILL]);
    }

    #[test]
    fn a_short_program_says_what_a_long_one_says() {
        for work in Work::ALL {
            assert_same(&work.calls(), &SeccompAction::Trap, &SeccompAction::Allow);
        }
    }

    #[test]
    fn what_is_taken_away_as_well() {
        assert_same(&Work::OpenToCommit.calls(), &SeccompAction::Allow, &SeccompAction::Trap);
    }

    #[test]
    fn rules_of_every_kind_hold() {
        let sandbox: [Call; 6] = [
            (libc::SYS_kill, Allowed::FirstAndOneOf(77, 1, &[9, 24])),
            (libc::SYS_wait4, Allowed::First(77)),
            (libc::SYS_ioctl, Allowed::OneOf(1, &[0xae80, 0x8090_ae81])),
            (libc::SYS_sendto, Allowed::First(3)),
            (libc::SYS_sendto, Allowed::First(4)),
            (libc::SYS_socket, Allowed::Always),
        ];
        let calls = Work::OpenToCommit.calls_and(&sandbox);
        assert_same(&calls, &SeccompAction::Trap, &SeccompAction::Allow);
    }

    #[test]
    fn more_calls_than_a_jump_reaches_and_a_rule_that_nothing_meets() {
        let calls: BTreeMap<i64, Vec<Allowed>> = (0..600).map(|call| (call, vec![Allowed::Always])).collect();
        let program = compile(&calls, SeccompAction::Trap, SeccompAction::Allow).unwrap();
        for number in 0..700 {
            let asked = Asked { number, architecture: X86_64, arguments: [0; 6] };
            assert_eq!(run(&program, &asked), if number < 600 { ALLOW } else { TRAP }, "{number}");
        }
        let never = [(1, vec![Allowed::OneOf(0, &[])])].into_iter().collect();
        assert!(compile(&never, SeccompAction::Trap, SeccompAction::Allow).is_err());
    }
}
