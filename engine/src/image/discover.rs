//! What is below an image: the ancestors of a backing, which are read where a cluster is only partly overwritten, and the
//! layers of a chain that is only looked at.

use super::base::{not_allowed, recorded_format, too_deep};
use super::open::{Access, ChainImage, OpenedFile};
use super::write_target::Gate;
use crate::error::Error;
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;

/// Open everything below the last of the images `above`, nearest first, for reading only: `room` images at most. What they
/// record leads where `gate` lets it, and to none of them.
///
/// # Errors
/// [`ErrorCode::ChainLoop`], [`ErrorCode::ChainTooDeep`], [`ErrorCode::BackingNotFound`],
/// [`ErrorCode::WriteTargetNotAllowed`], and what opening and probing give.
pub fn discover_backing_chain<'r>(
    registry: &'r Registry,
    above: &[&ChainImage<'_>],
    room: usize,
    access: Access,
    gate: &Gate,
) -> Result<Vec<ChainImage<'r>>, Error> {
    let mut seen: Vec<_> = above.iter().map(|image| image.opened.identity).collect();
    let mut ancestors: Vec<ChainImage<'r>> = Vec::new();
    loop {
        let lowest = ancestors.last().or(above.last().copied());
        let Some((lowest, pointer)) =
            lowest.and_then(|image| Some((image, image.facts.backing.as_ref().into_option()?)))
        else {
            return Ok(ancestors);
        };
        let path = &lowest.opened.path;
        if ancestors.len() >= room {
            return Err(too_deep(path));
        }
        let located = gate
            .locate_any(&lowest.opened.directory(), pointer.names())
            .map_err(|error| not_allowed(path, &error, "allow its directory with --allow-backing-dir"))?;
        let opened = OpenedFile::located(&located, access, ErrorCode::BackingNotFound)?;
        if seen.contains(&opened.identity) {
            return Err(Error::image(path, ErrorCode::ChainLoop, "the backing chain leads back to itself"));
        }
        seen.push(opened.identity);
        let image = opened.lock(access)?.identify_recorded(registry, recorded_format(&lowest.facts))?;
        ancestors.push(image);
    }
}
