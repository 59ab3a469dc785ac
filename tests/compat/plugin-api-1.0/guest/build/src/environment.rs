//! The environment of the inner cargo: nothing of the outer build but where the tools and the registry are.

use std::ffi::{OsStr, OsString};

/// Variables that are kept although their prefix is cleared: tool chain, caches, network and job server.
const KEPT: &[&str] = &["CARGO_HOME", "CARGO_MAKEFLAGS", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN"];
const KEPT_PREFIXES: &[&str] = &["CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_TERM_"];
/// Everything that cargo sets for a build script, or that a user or clippy sets to change a build.
const CLEARED_PREFIXES: &[&str] = &["CARGO", "RUST", "CLIPPY_", "DEP_", "LLVM_PROFILE_"];
const CLEARED: &[&str] =
    &["OUT_DIR", "TARGET", "HOST", "NUM_JOBS", "OPT_LEVEL", "PROFILE", "DEBUG", "SYSROOT", "LD_LIBRARY_PATH"];
/// What would change the C code of a module.
const CLEARED_C: &[&str] = &["CFLAGS", "HOST_CFLAGS", "TARGET_CFLAGS", "CPPFLAGS", "ZSTD_SYS_USE_PKG_CONFIG"];

/// Whether the inner cargo must not see this variable.
pub fn is_cleared(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    if KEPT.contains(&name.as_ref()) || KEPT_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
        return false;
    }
    let linker = name.starts_with("CARGO_TARGET_") && name.ends_with("_LINKER");
    let exactly = CLEARED.iter().chain(CLEARED_C).any(|cleared| *cleared == name);
    !linker && (exactly || CLEARED_PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
}

/// The variables of this process that the inner cargo must not see.
pub fn cleared() -> Vec<OsString> {
    std::env::vars_os().map(|(name, _)| name).filter(|name| is_cleared(name)).collect()
}
