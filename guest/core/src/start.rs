//! What is checked before anything runs.

use core::fmt;
use instar_guest_abi::{
    ChainConfig, ModuleDescriptor, ModuleEntry, ModuleKind, ModuleTable, OperationConfig, CHAIN_CONFIG_MAGIC,
    MAX_MEMBERS, MAX_MODULES, MODULE_ABI_MAJOR, MODULE_MAGIC, MODULE_TABLE_MAGIC, OPERATION_CONFIG_MAGIC,
};

/// Why the guest does not start. Any of these is a bug of the host or a module that does not fit it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartError {
    /// A configuration page does not begin with its magic.
    Magic(&'static str),
    /// The host speaks another version.
    HostVersion(u32),
    /// The module table names no operation or more modules than there can be.
    ModuleCount(u32),
    /// There are more members than there can be.
    MemberCount(usize),
    /// The heap is no heap.
    Heap,
    /// A module's entry returned no descriptor.
    NoDescriptor,
    /// A module was built for another version.
    ModuleVersion(u32),
    /// A module is of another kind than its place in the table says.
    ModuleKind(u32),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(what) => write!(f, "the {what} does not begin with its magic"),
            Self::HostVersion(major) => write!(f, "the host speaks version {major}, not {MODULE_ABI_MAJOR}"),
            Self::ModuleCount(count) => write!(f, "{count} modules are loaded, 2 to {MAX_MODULES} are possible"),
            Self::MemberCount(count) => write!(f, "{count} images take part, {MAX_MEMBERS} at most are possible"),
            Self::Heap => write!(f, "the heap is too small"),
            Self::NoDescriptor => write!(f, "its entry returned no valid descriptor"),
            Self::ModuleVersion(major) => {
                write!(f, "it was built for module version {major}, not {MODULE_ABI_MAJOR}")
            }
            Self::ModuleKind(kind) => write!(f, "it is of kind {kind}, which does not belong at its place"),
        }
    }
}

/// Check what the host wrote; returns the number of modules.
///
/// # Errors
/// The first thing that is wrong.
pub fn check_configuration(
    config: &OperationConfig,
    chain: &ChainConfig,
    modules: &ModuleTable,
) -> Result<usize, StartError> {
    if config.magic != OPERATION_CONFIG_MAGIC {
        return Err(StartError::Magic("operation configuration"));
    }
    if config.abi_major != MODULE_ABI_MAJOR {
        return Err(StartError::HostVersion(config.abi_major));
    }
    if chain.magic != CHAIN_CONFIG_MAGIC {
        return Err(StartError::Magic("chain configuration"));
    }
    let members = chain.members.count();
    if members > MAX_MEMBERS {
        return Err(StartError::MemberCount(members));
    }
    if modules.magic != MODULE_TABLE_MAGIC {
        return Err(StartError::Magic("module table"));
    }
    match usize::try_from(modules.count) {
        Ok(count) if (2..=MAX_MODULES).contains(&count) => Ok(count),
        _ => Err(StartError::ModuleCount(modules.count)),
    }
}

/// Check what a module's entry returned.
///
/// # Errors
/// The first thing that is wrong.
pub fn check_descriptor(descriptor: Option<&ModuleDescriptor>, kind: ModuleKind) -> Result<(), StartError> {
    let descriptor = descriptor.filter(|descriptor| descriptor.magic == MODULE_MAGIC && !descriptor.ops.is_null());
    let descriptor = descriptor.ok_or(StartError::NoDescriptor)?;
    if descriptor.abi_major != MODULE_ABI_MAJOR {
        return Err(StartError::ModuleVersion(descriptor.abi_major));
    }
    if descriptor.kind != kind as u32 {
        return Err(StartError::ModuleKind(descriptor.kind));
    }
    Ok(())
}

/// The name of a module, as far as it is text.
#[must_use]
pub fn module_name(entry: &ModuleEntry) -> &str {
    let end = entry.name.iter().position(|&byte| byte == 0).unwrap_or(entry.name.len());
    entry.name.get(..end).and_then(|name| core::str::from_utf8(name).ok()).unwrap_or("?")
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::ptr::null;

    fn configuration() -> (OperationConfig, ChainConfig, ModuleTable) {
        let config = OperationConfig {
            magic: OPERATION_CONFIG_MAGIC,
            abi_major: MODULE_ABI_MAJOR,
            ..OperationConfig::default()
        };
        let chain = ChainConfig { magic: CHAIN_CONFIG_MAGIC, ..ChainConfig::default() };
        (config, chain, ModuleTable { magic: MODULE_TABLE_MAGIC, count: 3, ..ModuleTable::default() })
    }

    #[test]
    fn a_wrong_configuration_is_found() {
        let (config, chain, modules) = configuration();
        assert_eq!(check_configuration(&config, &chain, &modules), Ok(3));
        let wrong = OperationConfig { abi_major: 9, ..config };
        assert_eq!(check_configuration(&wrong, &chain, &modules), Err(StartError::HostVersion(9)));
        let wrong = ChainConfig { magic: 0, ..chain };
        assert_eq!(check_configuration(&config, &wrong, &modules), Err(StartError::Magic("chain configuration")));
        for count in [0, 1, 17] {
            let wrong = ModuleTable { count, ..modules };
            assert_eq!(check_configuration(&config, &chain, &wrong), Err(StartError::ModuleCount(count)));
        }
    }

    #[test]
    fn a_wrong_descriptor_is_found() {
        let ops = 0_u64;
        let good = ModuleDescriptor {
            magic: MODULE_MAGIC,
            abi_major: MODULE_ABI_MAJOR,
            abi_minor: 7,
            kind: ModuleKind::Format as u32,
            reserved: 0,
            ops: (&raw const ops).cast(),
        };
        let check = |descriptor: ModuleDescriptor| check_descriptor(Some(&descriptor), ModuleKind::Format);
        assert_eq!(check(good), Ok(()));
        assert_eq!(check(ModuleDescriptor { magic: 1, ..good }), Err(StartError::NoDescriptor));
        assert_eq!(check(ModuleDescriptor { ops: null(), ..good }), Err(StartError::NoDescriptor));
        assert_eq!(check(ModuleDescriptor { abi_major: 2, ..good }), Err(StartError::ModuleVersion(2)));
        assert_eq!(check(ModuleDescriptor { kind: 2, ..good }), Err(StartError::ModuleKind(2)));
        assert_eq!(check_descriptor(None, ModuleKind::Format), Err(StartError::NoDescriptor));
    }

    #[test]
    fn names_end_at_the_first_zero() {
        let mut entry = ModuleEntry::default();
        entry.name[..5].copy_from_slice(b"qcow2");
        assert_eq!(module_name(&entry), "qcow2");
        entry.name.fill(0xff);
        assert_eq!(module_name(&entry), "?");
    }
}
