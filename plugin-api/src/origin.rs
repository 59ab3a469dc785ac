//! What the types of this crate were built from.
//!
//! Comparing the types of a plugin with those of the engine, field by field, takes longer than everything else that loading it
//! does. Types that come from the same sources by the same compiler are the same, so that a plugin says what its own come from.
//! Where the engine's come from something else, or the plugin says nothing, they are compared.

use crate::fnv;
use abi_stable::std_types::RString;
use abi_stable::StableAbi;

/// Name of the symbol that a plugin exports besides its header: an `extern "C" fn() -> u64`, which returns [`origin`]. A plugin
/// need not have it.
pub const ORIGIN_SYMBOL: &str = "instar_plugin_origin";

/// A hash of what decides the types of the contract: the sources of this crate, the compiler, and the version of `abi_stable`.
#[must_use]
pub fn origin() -> u64 {
    let (package, version) = RString::LAYOUT.item_info().package_and_version();
    [env!("INSTAR_CONTRACT_SOURCES"), package, version]
        .iter()
        .fold(fnv::START, |hash, part| fnv::take_in(fnv::take_in(hash, part.as_bytes()), b"\0"))
}
