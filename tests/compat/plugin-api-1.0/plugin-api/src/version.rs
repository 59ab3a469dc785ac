//! The rule that decides which plugins an engine loads.

/// Version of the plugin contract: that of this crate.
pub const API_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Parse `major` and `minor` from a version string like `1.4.0`, `1.4` or `1.4.0-rc.1`.
#[must_use]
pub fn major_minor(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.split('.');
    let major = number(parts.next()?)?;
    let minor = number(parts.next()?)?;
    Some((major, minor))
}

fn number(text: &str) -> Option<u64> {
    // A leading `+` would be accepted by `parse`.
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// Decide whether an engine with contract version `engine` loads a plugin built with `plugin`: the major versions have to be
/// equal. A minor version only adds optional functions, so it does not matter which side is newer.
///
/// Under major version 0, which promises nothing in semver, the minor versions must be equal. The layout check of `abi_stable`
/// applies the same rule to the version of this crate, which is why the contract begins with 1.0.
///
/// # Errors
/// One clause with the reason and a remedy.
pub fn accepts(engine: &str, plugin: &str) -> Result<(), String> {
    let Some((engine_major, engine_minor)) = major_minor(engine) else {
        return Err(format!("the engine's plugin API version {engine:?} is not a version"));
    };
    let Some((major, minor)) = major_minor(plugin) else {
        return Err(format!("its plugin API version {plugin:?} is not a version"));
    };
    if major != engine_major {
        let advice = if major > engine_major { "update instar" } else { "rebuild the plugin" };
        return Err(format!("built for plugin API {plugin}, this instar has {engine}: {advice}"));
    }
    if major == 0 && minor != engine_minor {
        return Err(format!(
            "built for the preview {plugin} of the plugin API, this instar has {engine}: rebuild the plugin"
        ));
    }
    Ok(())
}
