//! Which plugins an engine loads.

/// Version of the plugin contract: that of this crate.
pub const API_VERSION: &str = env!("CARGO_PKG_VERSION");

/// `major` and `minor` of a version string like `1.4.0`, `1.4` or `1.4.0-rc.1`.
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

/// Whether an engine with contract version `engine` loads a plugin built with `plugin`: one with the same major version. A minor
/// version only adds what both sides can do without, so it does not matter whose is newer.
///
/// A major version of 0 promises nothing, as semver has it: then the minor versions must be equal. The layout check of
/// `abi_stable` holds the version of this crate to the same rule, which is why the contract begins with 1.0.
///
/// # Errors
/// One clause that says why not, and what to do.
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
