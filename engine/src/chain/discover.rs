//! The ancestors of the backing: what is read where a cluster is only partly overwritten.

use super::base::{not_allowed, recorded_format, too_deep, Target};
use super::open::{Access, ChainImage, OpenedFile};
use super::write_target::Gate;
use crate::cli::CliError;
use crate::plugins::Registry;
use instar_guest_abi::{ErrorCode, MAX_CHAIN_DEVICES};

/// Open everything below the target, nearest first; the target itself is not among it.
///
/// # Errors
/// [`ErrorCode::ChainLoop`], [`ErrorCode::ChainTooDeep`], [`ErrorCode::BackingNotFound`],
/// [`ErrorCode::WriteTargetNotAllowed`], and what opening and probing give.
pub fn discover_backing_chain<'r>(
    registry: &'r Registry,
    overlay: &ChainImage<'_>,
    Target { backing, between }: &Target<'_>,
    gate: &Gate,
) -> Result<Vec<ChainImage<'r>>, CliError> {
    let mut seen = vec![overlay.opened.identity, backing.opened.identity];
    seen.extend(between.iter().map(|layer| layer.opened.identity));
    let mut ancestors: Vec<ChainImage<'r>> = Vec::new();
    loop {
        let lowest = ancestors.last().unwrap_or(backing);
        let Some(pointer) = lowest.facts.backing.as_ref().into_option() else {
            return Ok(ancestors);
        };
        let path = &lowest.opened.path;
        // The overlay has a slot of its own.
        if between.len() + ancestors.len() + 1 >= MAX_CHAIN_DEVICES {
            return Err(too_deep(path));
        }
        let located = gate
            .locate(&lowest.opened.directory(), &pointer.name)
            .map_err(|error| not_allowed(path, &error, "allow its directory with --allow-backing-dir"))?;
        let opened = OpenedFile::located(&located, Access::ReadOnly, ErrorCode::BackingNotFound)?;
        if seen.contains(&opened.identity) {
            return Err(CliError::image(path, ErrorCode::ChainLoop, "the backing chain leads back to itself"));
        }
        seen.push(opened.identity);
        let image = opened.lock(Access::ReadOnly)?.identify_recorded(registry, recorded_format(&lowest.facts))?;
        ancestors.push(image);
    }
}
