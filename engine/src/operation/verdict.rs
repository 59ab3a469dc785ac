//! Asking the plugin of an image for its verdict on the image's part in an operation.

use crate::error::Error;
use crate::escape::escape_path;
use crate::image::ChainImage;
use instar_guest_abi::{ErrorCode, ERROR_OK};
use instar_plugin_api::{Context, Role, ROLE_SINK, ROLE_SOURCE};

/// Ask the plugins of a chain, the top-most image first, whether each can be read below another image.
///
/// # Errors
/// As [`ask`].
pub fn ask_below(chain: &[&ChainImage<'_>], warnings: &mut Vec<String>) -> Result<(), Error> {
    for (index, layer) in chain.iter().enumerate() {
        let parent = chain.get(index + 1).map(|parent| &parent.facts);
        ask(layer, Role::Below, "be read", &Context::reading(parent, false), warnings)?;
    }
    Ok(())
}

/// Ask the plugin of an image for its verdict; `what` is the refusal, as in "cannot be read". Returns the maximum length of the
/// image's files in bytes, and adds the plugin's warnings to `warnings`.
///
/// # Errors
/// A verdict that refuses, and a plugin that lacks the role.
pub fn ask(
    image: &ChainImage<'_>,
    role: Role,
    what: &str,
    context: &Context<'_>,
    warnings: &mut Vec<String>,
) -> Result<u64, Error> {
    let refused = |code, clause: &str| Err(Error::image(&image.opened.path, code, clause));
    let needed = match role {
        Role::Read | Role::Empty | Role::Below => ROLE_SOURCE,
        Role::Write => ROLE_SINK,
    };
    if image.plugin.roles() & needed == 0 {
        let clause = format!("an image cannot {what} with this version of the {} plugin", image.plugin.name());
        return refused(ErrorCode::UnsupportedFormat, &clause);
    }
    let verdict = image.plugin.verdict(role, &image.facts, context);
    if verdict.code != ERROR_OK {
        return refused(ErrorCode::from_u32(verdict.code).unwrap_or(ErrorCode::PluginRefused), &verdict.reason);
    }
    if !verdict.reason.is_empty() {
        warnings.push(format!("'{}': {}", escape_path(&image.opened.path), verdict.reason));
    }
    Ok(verdict.max_length)
}
