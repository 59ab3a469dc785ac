//! Which file is committed into.

use super::open::{Access, ChainImage, Identity, OpenedFile};
use super::write_target::{is_protocol, Gate, NotAllowed};
use crate::error::Error;
use crate::escape::escape_bytes;
use crate::plugins::Registry;
use instar_guest_abi::{ErrorCode, MAX_CHAIN_DEVICES};
use instar_plugin_api::{BackingPointer, ImageFacts};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What the operator says about the backing.
#[derive(Clone, Copy, Debug)]
pub struct BackingChoice<'a> {
    /// `-b`: the file that the operator named.
    pub base: Option<&'a Path>,
    /// Where recorded names may lead.
    pub gate: &'a Gate,
    /// How the backing is opened.
    pub access: Access,
}

/// Refusal of a recorded name, with what to do.
pub(super) fn not_allowed(image: &Path, error: &NotAllowed, option: &str) -> Error {
    Error::image(image, ErrorCode::WriteTargetNotAllowed, format!("{}: {option}", error.0))
}

/// What is committed into, and the layers between it and the overlay, which are committed as well, the top-most first.
#[derive(Debug)]
pub struct Target<'r> {
    /// The image that is written.
    pub backing: ChainImage<'r>,
    /// Open for reading, but for the lowest one if that [`follows`](ChainImage::follows) the backing.
    pub between: Vec<ChainImage<'r>>,
}

/// Open the backing of an overlay: the file that `-b` names, which must be in the overlay's backing chain, or the one
/// that the overlay records.
///
/// # Errors
/// [`ErrorCode::NoBacking`], [`ErrorCode::NotInChain`], [`ErrorCode::WriteTargetNotAllowed`], and what opening gives.
pub fn resolve_backing<'r>(
    registry: &'r Registry,
    overlay: &ChainImage<'_>,
    choice: BackingChoice<'_>,
) -> Result<Target<'r>, Error> {
    let path = &overlay.opened.path;
    let Some(pointer) = overlay.facts.backing.as_ref().into_option() else {
        let clause = "has no recorded backing file, so there is nothing to commit into";
        return Err(Error::image(path, ErrorCode::NoBacking, clause));
    };
    let directory = overlay.opened.directory();
    let (opened, mut between) = match choice.base {
        None => {
            let located = choice.gate.locate_any(&directory, pointer.names()).map_err(|error| {
                not_allowed(path, &error, "name the backing with -b, or allow its directory with --allow-backing-dir")
            })?;
            (OpenedFile::located(&located, choice.access, ErrorCode::BackingNotFound)?, Vec::new())
        }
        Some(base) => open_base(registry, overlay, pointer, &directory.join(base), choice)?,
    };
    let same = opened.identity == overlay.opened.identity;
    if same {
        return Err(Error::image(path, ErrorCode::ChainLoop, "is its own backing file"));
    }
    let lowest = between.last().map_or(&overlay.facts, |layer: &ChainImage<'_>| &layer.facts);
    let backing = opened.lock(choice.access)?.identify_recorded(registry, recorded_format(lowest))?;
    if let Some(lowest) = between.pop() {
        let above = between.last().map_or(&overlay.facts, |layer: &ChainImage<'_>| &layer.facts);
        // A dry run changes nothing, so that it needs no layer open for writing.
        let follows = choice.access == Access::ReadWrite && lowest.facts.follows(&backing.facts);
        let lowest = if follows { to_follow(registry, lowest, above)? } else { lowest };
        between.push(lowest);
    }
    Ok(Target { backing, between })
}

/// The format that an image records for its backing.
pub(super) fn recorded_format(facts: &ImageFacts) -> Option<&[u8]> {
    let pointer = facts.backing.as_ref().into_option()?;
    pointer.format.as_ref().into_option().map(|format| format.as_slice())
}

/// The identity of a file that is only looked at.
fn identity(path: &Path) -> Option<Identity> {
    std::fs::metadata(path).ok().map(|metadata| Identity::of(&metadata))
}

/// Open the file that `-b` names, which must be the overlay's parent or an ancestor, and the layers above it: the file that
/// is open is compared, so that nobody can put another one in its place.
fn open_base<'r>(
    registry: &'r Registry,
    overlay: &ChainImage<'_>,
    pointer: &BackingPointer,
    target: &Path,
    choice: BackingChoice<'_>,
) -> Result<(OpenedFile, Vec<ChainImage<'r>>), Error> {
    let name = escape_bytes(&pointer.name);
    let opened = match OpenedFile::named(target, choice.access, ErrorCode::BackingNotFound) {
        Err(error) if error.code == ErrorCode::BackingNotFound => {
            let clause = format!(
                "does not exist (a relative name begins at the overlay's directory); the overlay's immediate parent is {name}"
            );
            return Err(Error::image(target, error.code, clause));
        }
        other => other?,
    };
    // The recorded name is only compared here, by what it leads to; what is opened is the operator's own name.
    let is_it = |name: &[u8]| {
        let parent = overlay.opened.directory().join(OsStr::from_bytes(name));
        !is_protocol(name) && identity(&parent) == Some(opened.identity)
    };
    if pointer.names().any(is_it) {
        return Ok((opened, Vec::new()));
    }
    let why = match layers_above(registry, overlay, opened.identity, choice.gate) {
        Ok(Some(between)) => return Ok((opened, between)),
        Ok(None) => String::new(),
        Err(error) if error.code == ErrorCode::ImageInUse => return Err(error),
        Err(error) => format!(", as far as that can be followed ({error})"),
    };
    let clause = format!("is not in the backing chain of the overlay{why}: the overlay's immediate parent is {name}");
    Err(Error::image(target, ErrorCode::NotInChain, clause))
}

/// The layers between the overlay and the image `wanted`, the top-most first, open for reading; `None` if the chain ends
/// without it.
fn layers_above<'r>(
    registry: &'r Registry,
    overlay: &ChainImage<'_>,
    wanted: Identity,
    gate: &Gate,
) -> Result<Option<Vec<ChainImage<'r>>>, Error> {
    let mut between: Vec<ChainImage<'r>> = Vec::new();
    let mut seen = vec![overlay.opened.identity];
    loop {
        let (opened, facts) = match between.last() {
            None => (&overlay.opened, &overlay.facts),
            Some(layer) => (&layer.opened, &layer.facts),
        };
        let Some(pointer) = facts.backing.as_ref().into_option() else { return Ok(None) };
        let located = gate
            .locate_any(&opened.directory(), pointer.names())
            .map_err(|error| not_allowed(&opened.path, &error, "allow its directory with --allow-backing-dir"))?;
        let next = OpenedFile::located(&located, Access::ReadOnly, ErrorCode::BackingNotFound)?;
        if next.identity == wanted {
            return Ok(Some(between));
        }
        if seen.contains(&next.identity) {
            return Err(Error::image(&opened.path, ErrorCode::ChainLoop, "the backing chain leads back to itself"));
        }
        if between.len() + 1 >= MAX_CHAIN_DEVICES {
            return Err(too_deep(&opened.path));
        }
        seen.push(next.identity);
        let layer = next.lock(Access::ReadOnly)?.identify_recorded(registry, recorded_format(facts))?;
        between.push(layer);
    }
}

/// The same layer, open for writing, because what it records of its parent is going to change. `above` are the facts of the
/// image above it.
fn to_follow<'r>(registry: &'r Registry, layer: ChainImage<'r>, above: &ImageFacts) -> Result<ChainImage<'r>, Error> {
    let ChainImage { opened, facts, .. } = layer;
    let (path, identity) = (opened.path.clone(), opened.identity);
    // The lock of the file that is only read goes with it.
    drop(opened);
    let opened = OpenedFile::named(&path, Access::ReadWrite, ErrorCode::BackingNotFound)?;
    if opened.identity != identity {
        let clause = "is another file than a moment ago: make sure that nothing else changes the chain, and try again";
        return Err(Error::image(&path, ErrorCode::OpenFailed, clause));
    }
    let layer = opened.lock(Access::ReadWrite)?.identify_recorded(registry, recorded_format(above))?;
    if layer.facts != facts {
        let clause = "was changed a moment ago: make sure that nothing else uses the chain, and try again";
        return Err(Error::image(&path, ErrorCode::HeaderMismatch, clause));
    }
    Ok(ChainImage { follows: true, ..layer })
}

/// There are more layers than devices.
pub(super) fn too_deep(path: &Path) -> Error {
    let clause = format!("the backing chain has more than {MAX_CHAIN_DEVICES} layers below the overlay");
    Error::image(path, ErrorCode::ChainTooDeep, clause)
}
