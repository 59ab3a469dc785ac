//! Finding the target of a commit.

use super::access::Access;
use super::advice::RecordedRole;
use super::chain::{parent_is_unrecorded, Descent};
use super::chain_image::ChainImage;
use super::gate::Located;
use super::named::NamedFile;
use super::open::OpenedFile;
use crate::error::Error;
use crate::escape::escape_bytes;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::PROBE_ANYTHING;

/// The operator's choice of the backing.
#[derive(Clone, Copy, Debug)]
pub struct BackingChoice<'a> {
    /// `-b`: the file that the operator named.
    pub base: Option<&'a NamedFile>,
    /// `-F`: the format that it is of.
    pub format: Option<&'a str>,
    /// The way to open it: a dry run only reads.
    pub access: Access,
}

/// The target, and the layers between it and the overlay, which are committed as well, top-most first.
#[derive(Debug)]
pub struct Target<'r> {
    /// The image that is written.
    pub backing: ChainImage<'r>,
    /// Open for reading, but for the lowest one if that [`follows`](ChainImage::follows) the backing.
    pub between: Vec<ChainImage<'r>>,
    /// Whether no recorded name leads to the file, and its identity alone proves that it is the parent.
    pub stands_in: bool,
}

/// Open the backing of an overlay: the file that `-b` names, which must be in the overlay's backing chain, or the one that the
/// overlay records. An overlay of a format that records no parent has the one that `-b` names. What is below it is left to `descent`, the way down from the overlay.
///
/// # Errors
/// [`ErrorCode::NoBacking`], [`ErrorCode::NotInChain`], [`ErrorCode::WriteTargetNotAllowed`], and what opening gives.
pub fn resolve_backing<'r>(
    descent: &mut Descent<'r, '_>,
    overlay: &ChainImage<'_>,
    choice: BackingChoice<'_>,
) -> Result<Target<'r>, Error> {
    let access = choice.access;
    let path = &overlay.opened.path;
    let Some(pointer) = overlay.facts.backing.as_ref().into_option() else {
        let clause = "has no recorded backing file, so there is nothing to commit into";
        return Err(Error::image(path, ErrorCode::NoBacking, clause));
    };
    descent.passed(overlay.opened.identity);
    if parent_is_unrecorded(&overlay.facts) {
        let Some(base) = choice.base else {
            let clause = "records nothing of a parent, as its format has no place for that: name the parent with `instar commit -b`";
            return Err(Error::image(path, ErrorCode::NoBacking, clause));
        };
        return open_unrecorded(descent, overlay, base, choice);
    }
    if let Some(base) = choice.base {
        return open_base(descent, overlay, base, choice, &pointer.name);
    }
    let role = RecordedRole::Target;
    let nameless = pointer.name.is_empty() && overlay.facts.parent_identity_unique;
    let located = match nameless {
        true => descent.next_without_name(overlay, role, access)?,
        false => descent.next(overlay, role, access, None)?,
    };
    let Some(located) = located else {
        let clause = match nameless {
            true => "records which image it was made on, but not where that is: name that with `instar commit -b`",
            // There is a pointer.
            false => "has no recorded backing file",
        };
        return Err(Error::image(path, ErrorCode::NoBacking, clause));
    };
    let opened = OpenedFile::located(&located, &overlay.recorder(role), access)?.lock(access)?;
    let backing = descent.identify_target(overlay, &located, opened, choice.format)?;
    // Of a format that any bytes are an image of, nothing but the image's word says that this is one.
    if !backing.insisted
        && backing.doubt.is_none()
        && backing.opened.ends_within_a_sector()
        && backing.plugin.probe(&backing.opened.file).is_ok_and(|score| score == PROBE_ANYTHING)
    {
        return Err(overlay.recorder(role).uneven(&pointer.name, &backing.opened.path, backing.opened.length()));
    }
    Ok(Target { backing, between: Vec::new(), stands_in: false })
}

/// Open the file that `-b` names, which must be the overlay's parent or an ancestor, and the layers above it. Where it is in
/// the chain is found by following the chain: the path that `-b` gives plays no part in that. Only where a recorded name leads
/// nowhere, and identities prove that the file is the one that was meant, it stands for that name.
fn open_base<'r>(
    descent: &mut Descent<'r, '_>,
    overlay: &ChainImage<'_>,
    base: &NamedFile,
    choice: BackingChoice<'_>,
    parent: &[u8],
) -> Result<Target<'r>, Error> {
    let BackingChoice { format, access, .. } = choice;
    let parent = match parent {
        [] => "the overlay records no name of its parent".to_owned(),
        parent => format!("the overlay's immediate parent is {}", escape_bytes(parent)),
    };
    let rebase = || format!("if that is this file, moved, {}", overlay.recorder(RecordedRole::Ancestor).record("it"));
    let opened = match base.open(access, ErrorCode::BackingNotFound) {
        Err(error) if error.code == ErrorCode::BackingNotFound => {
            let clause = format!("does not exist (a relative name begins at the overlay's directory); {parent}");
            return Err(Error::image(base.path(), error.code, clause));
        }
        other => other?,
    };
    let role = RecordedRole::Ancestor;
    let mut between: Vec<ChainImage<'r>> = Vec::new();
    let mut lowest: Option<Located> = None;
    let backing = loop {
        let above = between.last().map_or(overlay, |lowest| lowest);
        let located = match descent.next(above, role, Access::ReadOnly, Some(opened.identity)) {
            Ok(Some(located)) => located,
            Ok(None) => {
                let clause = format!("is not in the backing chain of the overlay: {parent}; {}", rebase());
                return Err(Error::image(base.path(), ErrorCode::NotInChain, clause));
            }
            Err(error) => {
                if !is_nowhere(&error, above) {
                    return Err(lost(base, error, &parent));
                }
                let Some(backing) = proven(descent, above, opened, choice)? else {
                    let clause = format!(
                        "is not in the backing chain of the overlay, as far as that can be followed ({error}), and has \
                         not the identity that is recorded there: {parent}"
                    );
                    return Err(Error::image(base.path(), ErrorCode::NotInChain, clause));
                };
                break backing;
            }
        };
        if located.is_named_by_operator() {
            // The names in it begin where the chain has it, and not where the operator does.
            let opened = OpenedFile { directory: located.beside().clone(), ..opened }.lock(access)?;
            break descent.identify_target(above, &located, opened, format)?;
        }
        let layer =
            descent.open(above, &located, role, Access::ReadOnly).map_err(|error| lost(base, error, &parent))?;
        between.push(layer);
        lowest = Some(located);
    };
    let stands_in = !descent.is_led_to(between.last().unwrap_or(overlay), &backing.opened);
    // A dry run changes nothing, so that it needs no layer open for writing.
    if let (Access::ReadWrite, Some(lowest)) = (access, &lowest) {
        let_follow(descent, overlay, &mut between, lowest, &backing)?;
    }
    Ok(Target { backing, between, stands_in })
}

/// Open the file that `-b` names as the parent of an overlay whose format records none. Nothing can contradict the operator.
fn open_unrecorded<'r>(
    descent: &mut Descent<'r, '_>,
    overlay: &ChainImage<'_>,
    base: &NamedFile,
    choice: BackingChoice<'_>,
) -> Result<Target<'r>, Error> {
    let opened = base.open(choice.access, ErrorCode::BackingNotFound)?;
    descent.step(overlay, opened.identity)?;
    let opened = opened.lock(choice.access)?;
    let backing = descent.identify_unnamed(overlay, opened, choice.format)?;
    Ok(Target { backing, between: Vec::new(), stands_in: false })
}

/// Whether the name that `above` records leads nowhere, and an identity can stand for it.
fn is_nowhere(error: &Error, above: &ChainImage<'_>) -> bool {
    let nowhere = matches!(
        error.code,
        ErrorCode::BackingNotFound
            | ErrorCode::OpenFailed
            | ErrorCode::PermissionDenied
            | ErrorCode::WriteTargetNotAllowed
    );
    nowhere && above.facts.parent_identity_unique && !above.facts.parent_identity.is_empty()
}

/// The file that `-b` names as what is below `above`, if identities prove that it is. `None` if they do not.
fn proven<'r>(
    descent: &mut Descent<'r, '_>,
    above: &ChainImage<'_>,
    opened: OpenedFile,
    choice: BackingChoice<'_>,
) -> Result<Option<ChainImage<'r>>, Error> {
    let opened = opened.lock(choice.access)?;
    let Ok(backing) = descent.identify_unnamed(above, opened, choice.format) else { return Ok(None) };
    if !above.facts.is_proven_child_of(&backing.facts, &backing.next_identity(&above.facts)) {
        return Ok(None);
    }
    descent.step(above, backing.opened.identity)?;
    Ok(Some(backing))
}

/// Open the lowest of the merged layers, which `located` is, again for writing if it records an identity of `backing` that is
/// going to change.
fn let_follow<'r>(
    descent: &Descent<'r, '_>,
    overlay: &ChainImage<'_>,
    between: &mut Vec<ChainImage<'r>>,
    located: &Located,
    backing: &ChainImage<'_>,
) -> Result<(), Error> {
    let Some(lowest) = between.pop_if(|lowest| lowest.has_to_follow(backing)) else {
        return Ok(());
    };
    let ChainImage { opened, facts, .. } = lowest;
    // The lock of the file that is only read goes with it.
    drop(opened);
    let above = between.last().map_or(overlay, |lowest| lowest);
    let layer = descent.open(above, located, RecordedRole::Ancestor, Access::ReadWrite)?;
    if layer.facts != facts {
        let clause = "was changed a moment ago: make sure that nothing else uses the chain, and try again";
        return Err(Error::image(&layer.opened.path, ErrorCode::HeaderMismatch, clause));
    }
    between.push(ChainImage { follows: true, ..layer });
    Ok(())
}

/// The chain could not be followed as far as `-b`.
fn lost(base: &NamedFile, error: Error, parent: &str) -> Error {
    match error.code {
        ErrorCode::ImageInUse | ErrorCode::ChainTooDeep | ErrorCode::ChainLoop | ErrorCode::WriteTargetNotAllowed => {
            error
        }
        // This process has no more of something: it says nothing of the chain.
        _ if matches!(error.errno(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => error,
        _ => {
            let clause = format!(
                "is not in the backing chain of the overlay, as far as that can be followed ({error}): {parent}"
            );
            Error::image(base.path(), ErrorCode::NotInChain, clause)
        }
    }
}
