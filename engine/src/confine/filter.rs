//! seccomp: a list of system calls as a filter of the kernel.

use super::calls::{Allowed, Work};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// Which threads a filter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Threads {
    /// All of the process.
    All,
    /// The calling one, and those that it starts.
    This,
}

/// From now on, a system call that this work does not need ends the process. Returns how many there are.
///
/// # Errors
/// Why there is no filter: one clause.
pub(super) fn apply(work: Work, threads: Threads) -> Result<usize, String> {
    let calls = work.calls();
    let program = compile(&calls).map_err(|error| error.to_string())?;
    match threads {
        Threads::All => seccompiler::apply_filter_all_threads(&program),
        Threads::This => seccompiler::apply_filter(&program),
    }
    .map_err(|error| error.to_string())?;
    Ok(calls.len())
}

/// Whatever is not in the list ends the process, as does every call of another architecture's numbering.
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
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

impl Allowed {
    /// The rules of which one has to hold.
    fn conditions(&self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let rule = |argument: u8, operator: SeccompCmpOp, value: u64| {
            // The kernel takes each of these arguments as 32 bits.
            let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
            SeccompRule::new(vec![condition])
        };
        match *self {
            Self::Always => Ok(Vec::new()),
            Self::OneOf(argument, values) => {
                values.iter().map(|&value| rule(argument, SeccompCmpOp::Eq, value.into())).collect()
            }
            Self::Without(argument, bits) => Ok(vec![rule(argument, SeccompCmpOp::MaskedEq(bits.into()), 0)?]),
            Self::OwnProcess(argument) => Ok(vec![rule(argument, SeccompCmpOp::Eq, std::process::id().into())?]),
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
