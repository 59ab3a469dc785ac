//! Where the modules are in a guest's memory.

use super::error::printable;
use std::ops::Range;

/// Where a module is.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its image.
    pub range: Range<u64>,
}

/// The module, its version, and the offset of `address`.
pub fn place(modules: &[Placed], address: u64) -> String {
    match modules.iter().find(|module| module.range.contains(&address)) {
        Some(module) => {
            format!("{} {}+{:#x}", printable(&module.name), printable(&module.version), address - module.range.start)
        }
        None => format!("code outside every module, at {address:#x}"),
    }
}
