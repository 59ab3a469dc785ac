//! Taking a root module out of a library, for engines: whichever of the two has more functions.

use abi_stable::abi_stability::check_layout_compatibility;
use abi_stable::library::{LibHeader, RootModule};

/// The root module of a library as `M`; `None` if the functions that both have, or the types that these take, differ.
///
/// A minor version of the contract appends functions behind the prefix of a root module, and reads each as an `Option`.
/// `abi_stable` lets a library have more of them than the engine, and refuses one that has fewer: then this compares the layouts
/// the other way round. The text of a mismatch is up to 10 KB of type descriptions: it is dropped.
///
/// The version strings are not compared: [`version::accepts`](crate::version::accepts) does that, before.
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
