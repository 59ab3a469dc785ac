//! Checking that an image lies above the one that it was made on. Some formats record identities, which this module only
//! compares, so that no format has to know another one.

use super::access::Access;
use super::advice::RecordedRole;
use super::chain::Descent;
use super::chain_image::ChainImage;
use super::gate::Gate;
use crate::cancel::Cancel;
use crate::error::Error;
use crate::escape::escape_path;
use crate::plugins::{Plugin, Registry};
use instar_guest_abi::ErrorCode;
use instar_plugin_api::ImageFacts;
use std::fmt::Write;
use std::path::Path;

/// An identity for a person.
fn hexadecimal(identity: &[u8]) -> String {
    identity.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Return the reason why the image at `path` with the facts `parent`, of the format of `plugin`, cannot be below an image with
/// the facts `child`, as one clause about that image; `None` if it can.
#[must_use]
pub fn parent_mismatch(child: &ImageFacts, path: &Path, plugin: &Plugin, parent: &ImageFacts) -> Option<String> {
    if child.goes_with(parent, &plugin.next_identity(parent, child)) {
        return None;
    }
    let has = match parent.identity.as_slice() {
        [] => "has none".to_owned(),
        identity => format!("has {}", hexadecimal(identity)),
    };
    Some(format!(
        "was made on an image with the identity {}, but '{}' {has}: another child was merged into that one, something else \
         changed it since, it was restored from a backup, or it is another image; put back the one that it was made on",
        hexadecimal(&child.parent_identity),
        escape_path(path)
    ))
}

/// Refuse a chain, top-most image first, in which an image does not lie above the one that it was made on.
///
/// # Errors
/// [`ErrorCode::ParentMismatch`].
pub fn check_parents(chain: &[&ChainImage<'_>]) -> Result<(), Error> {
    for (child, parent) in chain.iter().zip(chain.iter().skip(1)) {
        if let Some(clause) = parent_mismatch(&child.facts, &parent.opened.path, parent.plugin, &parent.facts) {
            return Err(Error::image(&child.opened.path, ErrorCode::ParentMismatch, clause));
        }
    }
    Ok(())
}

/// Refuse a single image whose parent is not the one that it was made on, or is to be given back what it was. A missing or
/// inaccessible parent is no reason to refuse.
///
/// # Errors
/// [`ErrorCode::ParentMismatch`], [`ErrorCode::RecoveryNeeded`].
pub fn check_immediate_parent(
    registry: &Registry,
    image: &ChainImage<'_>,
    gate: &Gate,
    cancel: &Cancel,
) -> Result<(), Error> {
    let mut descent = Descent::new(registry, gate, &image.opened.path, 1, cancel);
    let (role, access) = (RecordedRole::Ancestor, Access::Shared);
    let Ok(Some(located)) = descent.next(image, role, access, None) else { return Ok(()) };
    located.refuse_unfinished()?;
    if image.facts.parent_identity.is_empty() {
        return Ok(());
    }
    match descent.open(image, &located, role, access) {
        Ok(parent) => check_parents(&[image, &parent]),
        Err(_) => Ok(()),
    }
}
