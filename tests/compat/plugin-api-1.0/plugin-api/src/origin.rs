//! The origin of this crate's types: the sources and the compiler that they were built from.
//!
//! Comparing the types of a plugin with those of the engine, field by field, takes longer than the rest of loading it. The same
//! sources and the same compiler yield the same types, so a plugin exports the origin of its own. The engine compares the types
//! only if the origins differ or the plugin exports none.

use crate::fnv;
use abi_stable::std_types::RString;
use abi_stable::StableAbi;

/// Name of the symbol that a plugin exports beside its header: an `extern "C" fn() -> u64` that returns [`origin`]. It is
/// optional.
pub const ORIGIN_SYMBOL: &str = "instar_plugin_origin";

/// Hash everything that determines the types of the contract: the sources of this crate, the compiler, and the version of
/// `abi_stable`.
#[must_use]
pub fn origin() -> u64 {
    let (package, version) = RString::LAYOUT.item_info().package_and_version();
    [env!("INSTAR_CONTRACT_SOURCES"), package, version]
        .iter()
        .fold(fnv::START, |hash, part| fnv::take_in(fnv::take_in(hash, part.as_bytes()), b"\0"))
}
