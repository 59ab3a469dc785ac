//! Extracting a root module from a library, for engines, whichever side has more functions.

use crate::v1::PluginModuleV1_Ref;
use abi_stable::abi_stability::check_layout_compatibility;
use abi_stable::library::{LibHeader, RootModule};

pub use crate::origin::{origin, ORIGIN_SYMBOL};

/// Return the root module of a library as `M`, or `None` if the functions that both sides have, or the types of their
/// arguments, differ.
///
/// A minor version of the contract appends functions behind the prefix of a root module, and reads each as an `Option`.
/// `abi_stable` accepts a library with more functions than the engine and refuses one with fewer: in that case this compares
/// the layouts the other way round. The text of a mismatch, up to 10 KB of type descriptions, is dropped.
///
/// The caller compares the versions first, with [`version::accepts`](crate::version::accepts).
#[must_use]
pub fn root_module<M: RootModule>(header: &LibHeader) -> Option<M> {
    if let Ok(module) = header.check_layout::<M>() {
        return Some(module);
    }
    check_layout_compatibility(header.layout()?, M::LAYOUT).into_result().ok()?;
    // SAFETY: the library's module is the beginning of an `M`, with a prefix as long as that of `M`. What follows the prefix is
    // read by accessors that look first whether this module, which says how many functions it has, has that one.
    unsafe { header.unchecked_layout::<M>() }.ok()
}

/// Return the root module of a library that speaks interface 1, as [`root_module`] does. `origin` is the [origin of its
/// types](ORIGIN_SYMBOL), if the library exports one: equal origins prove equal types, and save comparing them.
#[must_use]
pub fn root_module_v1(header: &LibHeader, origin: Option<u64>) -> Option<PluginModuleV1_Ref> {
    if origin != Some(self::origin()) {
        return root_module(header);
    }
    // SAFETY: a library that exports its origin has the header of `export_plugin`. Its root module comes from the sources of this
    // crate, by the compiler that this was built with, and so is of the same type.
    unsafe { header.unchecked_layout::<PluginModuleV1_Ref>() }.ok()
}
