//! May this overlay be committed into this backing?

use super::error::CommitError;
use crate::chain::ChainImage;
use crate::cli::escape::{escape_path, printable};
use instar_guest_abi::ErrorCode;
use instar_plugin_api::{CommitRole, Verdict, ROLE_SINK, ROLE_SOURCE};

/// Ask the sizes, and every plugin. Returns the longest that the backing may become, in bytes.
///
/// # Errors
/// The first refusal.
pub fn give_verdicts(
    overlay: &ChainImage<'_>,
    backing: &ChainImage<'_>,
    ancestors: &[ChainImage<'_>],
) -> Result<u64, CommitError> {
    let (size, backing_size) = (overlay.facts.virtual_size, backing.facts.virtual_size);
    if size > backing_size {
        let clause = format!(
            "its virtual size of {size} bytes exceeds backing virtual size of {backing_size} bytes of '{}': \
             --resize-backing lets the backing grow",
            escape_path(backing.path())
        );
        return Err(CommitError::image(overlay.path(), ErrorCode::OverlayLargerThanBacking, clause));
    }
    ask(overlay, CommitRole::Overlay, backing)?;
    let verdict = ask(backing, CommitRole::Backing, overlay)?;
    for ancestor in ancestors {
        ask(ancestor, CommitRole::Ancestor, overlay)?;
    }
    Ok(verdict.max_length)
}

fn ask(own: &ChainImage<'_>, role: CommitRole, other: &ChainImage<'_>) -> Result<Verdict, CommitError> {
    let verdict = own.plugin.verdict(role, &own.facts, &other.facts);
    match ErrorCode::from_u32(verdict.code) {
        Some(ErrorCode::Ok) => {}
        code => {
            let part = match role {
                CommitRole::Overlay => "cannot be committed",
                CommitRole::Backing => "cannot be committed into",
                CommitRole::Ancestor => "cannot be read below the backing",
            };
            let clause = format!("{part}: {}", printable(&verdict.reason));
            return Err(CommitError::image(own.path(), code.unwrap_or(ErrorCode::PluginRefused), clause));
        }
    }
    let (needed, name) = match role {
        CommitRole::Overlay => (ROLE_SOURCE, "be committed from"),
        CommitRole::Backing => (ROLE_SINK, "be committed into"),
        CommitRole::Ancestor => (ROLE_SOURCE, "be read below the backing"),
    };
    if own.plugin.roles() & needed == 0 {
        let clause = format!("the {} plugin does not offer the role for it to {name}", own.plugin.name());
        return Err(CommitError::image(own.path(), ErrorCode::UnsupportedFormat, clause));
    }
    Ok(verdict)
}
