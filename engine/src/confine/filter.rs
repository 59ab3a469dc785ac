//! seccomp: a list of system calls as a filter of the kernel.

use super::calls::{Allowed, Call, Work};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// The last of the standard descriptors: standard error.
const LAST_STANDARD: u32 = 2;

/// Which threads a filter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Threads {
    /// All of the process.
    All,
    /// The calling one, and those that it starts.
    This,
}

/// From now on, a system call that this work does not need, and is none of the others, ends the process, [which says
/// so](super::trap). Returns how many there are.
///
/// # Errors
/// Why there is no filter: one clause.
pub(super) fn apply(work: Work, others: &[Call], threads: Threads) -> Result<usize, String> {
    let calls = work.calls_and(others);
    enforce(&calls, SeccompAction::Trap, SeccompAction::Allow, threads)?;
    Ok(calls.len())
}

/// The same for all threads of a process that has [such a filter](apply) for the work `before`, for which the kernel still asks
/// it. So the second one only names the calls that are taken away: a quarter of the instructions, which the kernel translates
/// now and runs for each call.
///
/// # Errors
/// Why there is no second filter: one clause.
pub(super) fn narrow(before: Work, work: Work, others: &[Call]) -> Result<usize, String> {
    let calls = work.calls_and(others);
    enforce(&taken_away(before, &calls), SeccompAction::Allow, SeccompAction::Trap, Threads::All)?;
    Ok(calls.len())
}

/// What the work `before` may call, and these calls are not.
fn taken_away(before: Work, calls: &BTreeMap<i64, Vec<Allowed>>) -> BTreeMap<i64, Vec<Allowed>> {
    let mut taken = before.calls();
    taken.retain(|call, allowed| {
        let kept = calls.get(call);
        allowed.retain(|one| !kept.is_some_and(|kept| kept.contains(one)));
        !allowed.is_empty()
    });
    taken
}

/// From now on, the kernel asks about each system call what this list makes of it: see [`compile`].
fn enforce(
    calls: &BTreeMap<i64, Vec<Allowed>>,
    other: SeccompAction,
    listed: SeccompAction,
    threads: Threads,
) -> Result<(), String> {
    let program = compile(calls, other, listed).map_err(|error| error.to_string())?;
    super::trap::install();
    match threads {
        Threads::All => seccompiler::apply_filter_all_threads(&program),
        Threads::This => seccompiler::apply_filter(&program),
    }
    .map_err(|error| error.to_string())
}

/// A call that is not in the list meets the action `other`, one that is, `listed`. Of these, `Trap` raises `SIGSYS` instead of
/// doing the call, and its handler cannot be replaced. A call of another architecture's numbering kills the process at once.
fn compile(
    calls: &BTreeMap<i64, Vec<Allowed>>,
    other: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = BTreeMap::new();
    for (call, allowed) in calls {
        let mut list = Vec::new();
        for one in allowed {
            list.extend(one.conditions()?);
        }
        // A call without rules is in the list whatever its arguments.
        rules.insert(*call, list);
    }
    SeccompFilter::new(rules, other, listed, TargetArch::x86_64)?.try_into()
}

impl Allowed {
    /// The rules of which one has to hold.
    fn conditions(&self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        // The kernel takes each of these arguments as 32 bits.
        let compare = |argument: u8, operator: SeccompCmpOp, value: u32| {
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())
        };
        // A negative descriptor counts as a large number: the kernel refuses it itself.
        let file = |argument: u8| compare(argument, SeccompCmpOp::Gt, LAST_STANDARD);
        let one = |condition| Ok(vec![SeccompRule::new(vec![condition?])?]);
        match *self {
            Self::Always => Ok(Vec::new()),
            Self::OneOf(argument, values) => values
                .iter()
                .map(|&value| SeccompRule::new(vec![compare(argument, SeccompCmpOp::Eq, value)?]))
                .collect(),
            Self::First(value) => one(compare(0, SeccompCmpOp::Eq, value)),
            Self::FirstAndOneOf(first, argument, values) => values
                .iter()
                .map(|&value| {
                    let both = vec![compare(0, SeccompCmpOp::Eq, first)?, compare(argument, SeccompCmpOp::Eq, value)?];
                    SeccompRule::new(both)
                })
                .collect(),
            Self::Except(argument, value) => one(compare(argument, SeccompCmpOp::Ne, value)),
            Self::Without(argument, bits) => one(compare(argument, SeccompCmpOp::MaskedEq(bits.into()), 0)),
            Self::OwnProcess(argument) => one(compare(argument, SeccompCmpOp::Eq, std::process::id())),
            Self::Files(arguments) => {
                let all: Result<Vec<_>, _> = arguments.iter().map(|&argument| file(argument)).collect();
                Ok(vec![SeccompRule::new(all?)?])
            }
            Self::FileOneOf(argument, values) => values
                .iter()
                .map(|&value| SeccompRule::new(vec![file(0)?, compare(argument, SeccompCmpOp::Eq, value)?]))
                .collect(),
            Self::Mapping => {
                let executable = u64::from(libc::PROT_EXEC.cast_unsigned());
                let never = compare(2, SeccompCmpOp::MaskedEq(executable), 0)?;
                Ok(vec![SeccompRule::new(vec![never, file(4)?])?])
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_list_fits_into_a_filter() {
        for work in Work::ALL {
            let program = compile(&work.calls(), SeccompAction::Trap, SeccompAction::Allow).unwrap();
            assert!(program.len() < 600, "{work:?}: {} instructions", program.len());
        }
    }

    #[test]
    fn what_is_taken_away_and_what_is_left_are_all_there_was() {
        for (before, after) in [(Work::OpenToCommit, Work::Commit), (Work::OpenToRead, Work::Read)] {
            // What the sandbox needs stays, though the work before asks for it, too.
            let others = [(libc::SYS_ioctl, Allowed::First(9)), (libc::SYS_getcwd, Allowed::Always)];
            let left = after.calls_and(&others);
            let taken = taken_away(before, &left);
            for call in [libc::SYS_open, libc::SYS_openat, libc::SYS_readlinkat, libc::SYS_seccomp] {
                assert_eq!(taken.get(&call), before.calls().get(&call), "{after:?} {call}");
            }
            assert!(!taken.contains_key(&libc::SYS_getcwd));
            let mut all = left.clone();
            for (call, allowed) in &taken {
                assert!(
                    allowed.iter().all(|one| left.get(call).is_none_or(|left| !left.contains(one))),
                    "{after:?} {call}"
                );
                all.entry(*call).or_default().extend(allowed);
            }
            for (call, allowed) in before.calls() {
                assert!(
                    allowed.iter().all(|one| all.get(&call).is_some_and(|all| all.contains(one))),
                    "{after:?} {call}"
                );
            }
            let program = compile(&taken, SeccompAction::Allow, SeccompAction::Trap).unwrap();
            assert!(program.len() < 130, "{after:?}: {} instructions", program.len());
        }
    }
}
