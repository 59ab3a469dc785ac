//! The backing file of the new image (`-B`): the new image holds the data of the layers above it.
//!
//! If the backing file is a layer of the source, these are the layers above it. If it is another file, the operator
//! declares that it shows the same disk as the image below the source, as for `qemu-img convert`.

use super::request::ConvertRequest;
use crate::error::Error;
use crate::escape::escape_path;
use crate::image::{check_parents, Access, ChainImage, Descent, NamedFile};
use crate::operation::Opener;
use instar_guest_abi::{ErrorCode, MAX_CHAIN_DEVICES};

/// The sources of a conversion.
#[derive(Debug, Default)]
pub struct Layers<'r> {
    /// The images whose content is copied, the top-most first.
    pub copied: Vec<ChainImage<'r>>,
    /// The images that will be below the new one, nearest first.
    pub below: Vec<ChainImage<'r>>,
    /// Whether no image is below the source, so that its zeroes have to hide the data below the new one.
    pub hides: bool,
}

/// Divide the source's chain at the backing file.
///
/// # Errors
/// [`ErrorCode::ChainLoop`] if the backing file is the source; [`ErrorCode::FormatMismatch`] if it has another format
/// than the operator says; errors of opening it.
pub fn divide<'r>(
    request: &ConvertRequest,
    opener: &Opener<'r, '_>,
    base: &NamedFile,
    mut layers: Vec<ChainImage<'r>>,
    warnings: &mut Vec<String>,
) -> Result<Layers<'r>, Error> {
    let format = request.backing.as_ref().map(|(_, format)| format.as_str());
    let place = layers.iter().position(|layer| base.identity() == Some(layer.opened.identity));
    match place {
        Some(0) => {
            let clause = "is the image that is read, and would be the new image's backing file: `instar create -b` makes an image \
                          that holds nothing itself";
            Err(Error::image(base.path(), ErrorCode::ChainLoop, clause))
        }
        Some(place) => {
            let below = layers.split_off(place);
            let first = below.first().filter(|first| {
                format.is_some_and(|format| first.plugin.name() != format && first.facts.format.as_str() != format)
            });
            if let Some(first) = first {
                let clause = format!("is a {} image: say -F {0}", first.facts.format);
                return Err(Error::image(base.path(), ErrorCode::FormatMismatch, clause));
            }
            Ok(Layers { copied: layers, below, hides: false })
        }
        None => {
            let opened = base.open(Access::ReadOnly, ErrorCode::BackingNotFound)?.lock(Access::ReadOnly)?;
            let first = opened.identify_as(opener.registry, format, "-F")?;
            let room = MAX_CHAIN_DEVICES.saturating_sub(layers.len().saturating_add(1));
            let mut descent = Descent::new(opener.registry, opener.below, base.path(), room, opener.session.cancel());
            let rest = descent.open_below(&first, Access::ReadOnly)?;
            let below: Vec<ChainImage<'_>> = std::iter::once(first).chain(rest).collect();
            check_parents(&below.iter().collect::<Vec<_>>())?;
            let hides = layers.len() == 1;
            if !hides {
                layers.truncate(1);
                warnings.push(format!(
                    "'{}': nothing was compared: it is to hold what the backing file of '{}' holds",
                    escape_path(base.path()),
                    escape_path(&request.source)
                ));
            }
            Ok(Layers { copied: layers, below, hides })
        }
    }
}
