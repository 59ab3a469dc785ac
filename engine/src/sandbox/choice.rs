//! Which sandbox an operator wants.

use super::error::SandboxError;
use super::{Kvm, Process, Ready, Sandbox};

/// The operator's choice of a sandbox. The weaker one is never used silently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SandboxChoice {
    /// A virtual machine.
    #[default]
    Kvm,
    /// A process that can do nothing.
    Process,
    /// A virtual machine where KVM works, otherwise a process.
    Auto,
}

impl SandboxChoice {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Kvm, Self::Process, Self::Auto];

    /// Do the same as [`Sandbox::acquire`], and pass the reason to `note` if the stronger one cannot be used and the operator
    /// did not choose the other.
    ///
    /// # Errors
    /// Why programs cannot run here.
    pub fn acquire_telling(self, workers: usize, note: &mut dyn FnMut(String)) -> Result<Box<dyn Ready>, SandboxError> {
        match self {
            Self::Kvm => Kvm.acquire(workers),
            Self::Process => Process.acquire(workers),
            Self::Auto => Kvm.acquire(workers).or_else(|error| {
                note(format!("no virtual machine: {error}"));
                Process.acquire(workers)
            }),
        }
    }

    /// Return the choice for an operator's word.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|choice| choice.name() == name)
    }
}

impl Sandbox for SandboxChoice {
    fn name(&self) -> &'static str {
        match self {
            Self::Kvm => Kvm.name(),
            Self::Process => Process.name(),
            Self::Auto => "auto",
        }
    }

    fn acquire(&self, workers: usize) -> Result<Box<dyn Ready>, SandboxError> {
        self.acquire_telling(workers, &mut |_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_choices() {
        assert_eq!(SandboxChoice::default().name(), "kvm");
        for choice in SandboxChoice::ALL {
            assert_eq!(SandboxChoice::from_name(choice.name()), Some(choice));
        }
        assert_eq!(SandboxChoice::from_name("KVM"), None);
    }
}
