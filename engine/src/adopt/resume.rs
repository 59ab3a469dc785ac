//! A second run after one that was killed before its last step: the overlay holds everything, and no longer leads to the target.

use super::mark::{read, Said, Stale};
use super::AdoptRequest;
use crate::error::Error;
use crate::image::{Access, ChainImage, Descent, NamedFile};
use crate::operation::Opener;
use instar_guest_abi::{ErrorCode, MAX_CHAIN_DEVICES};
use std::io;

/// What the overlay is, if nothing can tell whether it was on the way to the target.
const PERHAPS: &str =
    "if an earlier run with --by-adoption was interrupted, the overlay holds everything by now, and only has \
                       to be given the name of the target with `mv`";
/// What it is, if that was another file.
const ANOTHER: &str =
    "an earlier run with --by-adoption was interrupted, and this is not the file that it was to replace, or something wrote to it \
     since then. The overlay holds everything that it and that file held at that time: see with `instar compare` what was written \
     since, before you give the overlay the name of the file with `mv`";

/// Open the image whose place the overlay was about to take, and recall the layers between the two, where the mark of the overlay and what both record prove that. The
/// chain of the overlay does not lead to it, as `error` says.
///
/// # Errors
/// `error`, with what else is known; what opening and identifying the image give.
pub fn resume<'r>(
    request: &AdoptRequest,
    opener: &Opener<'r, '_>,
    overlay: &ChainImage<'_>,
    error: Error,
) -> Result<(ChainImage<'r>, Stale), Error> {
    let Some(base) = opener.named.base.as_ref() else { return Err(error) };
    let opened = base.open(opener.access, ErrorCode::BackingNotFound)?.lock(opener.access)?;
    let said = read(overlay.opened.file.file(), opened.file.file()).map_err(|errno| {
        let what = "cannot be asked whether it was on the way to another name";
        Error::io(&overlay.opened.path, ErrorCode::OpenFailed, what, &io::Error::from(errno))
    })?;
    let stale = match said {
        Said::This(stale) => stale,
        Said::Another => return Err(error.in_state(ANOTHER)),
        Said::Unknown if lacks(opener, base, overlay) => return Err(error.in_state(PERHAPS)),
        Said::Unknown | Said::Nothing => return Err(error),
    };
    let target = opened.identify_as(opener.registry, request.base_format.as_deref(), "-F")?;
    let recorded =
        |image: &ChainImage<'_>| image.facts.backing.as_ref().into_option().map(|pointer| pointer.name.to_vec());
    if recorded(overlay) == recorded(&target) {
        Ok((target, stale))
    } else {
        // Somebody has given one of them another parent.
        Err(error.in_state(ANOTHER))
    }
}

/// Whether the chain of an overlay can be followed to its end, and the target is not in it. What could not be looked at may be the
/// target: nobody is told then that the overlay does not need it.
fn lacks(opener: &Opener<'_, '_>, base: &NamedFile, overlay: &ChainImage<'_>) -> bool {
    let mut descent = Descent::new(
        opener.registry,
        opener.below,
        opener.named.image.path(),
        MAX_CHAIN_DEVICES,
        opener.session.cancel(),
    );
    let chain = descent.open_below(overlay, Access::ReadOnly);
    let base = base.identity();
    chain.is_ok_and(|chain| base.is_some() && chain.iter().all(|layer| Some(layer.opened.identity) != base))
}
