//! Which overlays can take the place of which targets: the target's name has to lead to what a commit would have left there.

use super::AdoptRequest;
use crate::bytes::Bytes;
use crate::error::{Error, Role};
use crate::image::ChainImage;
use instar_guest_abi::ErrorCode;

/// Refuse a pair for which an adoption would lose something that a commit keeps, or is impossible.
///
/// # Errors
/// What is in the way of it, and what to do.
pub fn admit(request: &AdoptRequest, overlay: &ChainImage<'_>, target: &ChainImage<'_>) -> Result<(), Error> {
    for (image, role) in [(overlay, Role::Overlay), (target, Role::Backing)] {
        let refused = |clause: String| {
            let clause = format!("{clause}: commit without --by-adoption");
            Err(Error::image(&image.opened.path, ErrorCode::UnsupportedFormat, clause).in_role(role))
        };
        if image.opened.block_device {
            return refused("is a block device, whose name no other can take".to_owned());
        }
        if !image.files.is_empty() {
            let count = image.files.len() + 1;
            return refused(format!("is an image in {count} files, which cannot change their names all at once"));
        }
        if !image.facts.snapshots.is_empty() {
            let (count, what) = (
                image.facts.snapshots.len(),
                match role {
                    Role::Overlay => "which read through the backing file",
                    _ => "which would be lost with it",
                },
            );
            return refused(format!("has internal snapshots ({count}), {what}"));
        }
        if !image.facts.identity.is_empty() || !image.facts.parent_identity.is_empty() {
            return refused(format!(
                "is a {} image, and its format records identities, which would be another image's afterwards",
                image.facts.format
            ));
        }
    }
    let of_target = |code, clause: String| Err(Error::image(&target.opened.path, code, clause).in_role(Role::Backing));
    let (over, under) = (&overlay.facts, &target.facts);
    if over.format != under.format {
        let clause = format!(
            "is a {} image, and the overlay a {} image, which would stand under its name: commit without --by-adoption",
            under.format, over.format
        );
        return of_target(ErrorCode::FormatMismatch, clause);
    }
    let bitmaps = under.bitmaps.as_ref().into_option().map_or(0, |bitmaps| bitmaps.len());
    if bitmaps > 0 {
        let clause = format!("has bitmaps ({bitmaps}), which would be lost with it: commit without --by-adoption");
        return of_target(ErrorCode::UnsupportedFormat, clause);
    }
    let own = over.bitmaps.as_ref().into_option().map_or(0, |bitmaps| bitmaps.len());
    if own > 0 && under.backing.is_none() {
        let clause = format!(
            "has bitmaps ({own}), and its header cannot lose the name of its backing file in one step: commit without \
             --by-adoption, with --bitmaps"
        );
        return Err(Error::image(&overlay.opened.path, ErrorCode::UnsupportedFormat, clause).in_role(Role::Overlay));
    }
    if over.virtual_size < under.virtual_size {
        let clause = format!(
            "is a disk of {}, and the overlay one of {}, whose end would be lost: commit without --by-adoption",
            Bytes(under.virtual_size),
            Bytes(over.virtual_size)
        );
        return of_target(ErrorCode::UnsupportedFormat, clause);
    }
    if over.virtual_size > under.virtual_size && !request.resize_backing {
        let clause = format!(
            "is a disk of {}, and would become one of {}, as the overlay is: add --resize-backing",
            Bytes(under.virtual_size),
            Bytes(over.virtual_size)
        );
        return of_target(ErrorCode::BackingTooSmall, clause);
    }
    Ok(())
}
