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
    let program = compile(&calls).map_err(|error| error.to_string())?;
    super::trap::install();
    match threads {
        Threads::All => seccompiler::apply_filter_all_threads(&program),
        Threads::This => seccompiler::apply_filter(&program),
    }
    .map_err(|error| error.to_string())?;
    Ok(calls.len())
}

/// Whatever is not in the list raises `SIGSYS` instead of being done, whose handler cannot be replaced. A call of another
/// architecture's numbering kills the process at once.
fn compile(calls: &BTreeMap<i64, Vec<Allowed>>) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = BTreeMap::new();
    for (call, allowed) in calls {
        let mut list = Vec::new();
        for one in allowed {
            list.extend(one.conditions()?);
        }
        // A call without rules is allowed whatever its arguments.
        rules.insert(*call, list);
    }
    SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
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
            let program = compile(&work.calls()).unwrap();
            assert!(program.len() < 600, "{work:?}: {} instructions", program.len());
        }
    }
}
