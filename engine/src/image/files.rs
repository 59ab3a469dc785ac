//! The other files of images in several files: opened like the images themselves, before anything else is asked of them.

use super::access::Access;
use super::advice::RecordedRole;
use super::chain_image::{ChainImage, ExtraFile};
use super::gate::Gate;
use super::identify::check_part;
use super::open::OpenedFile;
use crate::error::Error;
use crate::lookup::Identity;
use crate::plugins::{IdentifyError, ImageFiles, ImageRead, Registry};
use instar_guest_abi::{ErrorCode, MAX_FILE_DEVICES};
use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;

/// An image of the chain, how it is used, and where the names of its files may lead.
pub struct FilesOf<'i, 'r, 'g> {
    /// The image.
    pub image: &'i mut ChainImage<'r>,
    /// How its files are opened.
    pub access: Access,
    /// Whether the command changes them, or would if it were no dry run.
    pub changes: bool,
    /// The gate for their names.
    pub gate: &'g Gate,
}

/// Open the other files of these images, lock them, and ask for the facts again where there are any. No file may be there
/// twice: it would be written behind the back of the image that reads it.
///
/// # Errors
/// [`ErrorCode::WriteTargetNotAllowed`], [`ErrorCode::UnsupportedFormat`] for too many files, [`ErrorCode::ChainLoop`] for
/// one that is there twice, [`ErrorCode::FormatMismatch`] for one that is written to and looks like another image, and what
/// opening gives.
pub fn open_extra_files(registry: &Registry, images: &mut [FilesOf<'_, '_, '_>]) -> Result<(), Error> {
    let mut seen: Vec<Identity> = images.iter().map(|of| of.image.opened.identity).collect();
    for FilesOf { image, access, changes, gate } in &mut *images {
        let path = &image.opened.path;
        let failed = |error| Error::identify(path, &IdentifyError::Plugin(error));
        let named = image.plugin.files(&image.opened.file).map_err(failed)?;
        if named.is_empty() {
            continue;
        }
        if seen.len().saturating_add(named.len()) > MAX_FILE_DEVICES {
            let clause = format!("the chain has more files than the {MAX_FILE_DEVICES} that are supported: convert it");
            return Err(Error::image(path, ErrorCode::UnsupportedFormat, clause));
        }
        let mut others: Vec<ExtraFile> = Vec::with_capacity(named.len());
        for file in named {
            let recorder = image.recorder(RecordedRole::File);
            let located = gate.find(&recorder, file.names(), *access, None)?;
            let opened = OpenedFile::located(&located, &recorder, *access)?;
            if *changes {
                check_part(registry, image, &opened, &file.format)?;
            }
            // Plain bytes are a piece of the disk as it is.
            let plain = file.format == "raw";
            if *access == Access::ReadWrite && plain && opened.ends_within_a_sector() {
                return Err(recorder.uneven(&file.name, &opened.path, opened.length()));
            }
            if seen.contains(&opened.identity) {
                let clause = "is used twice in this chain: each file can be part of one image, once";
                return Err(Error::image(&opened.path, ErrorCode::ChainLoop, clause));
            }
            seen.push(opened.identity);
            others.push(ExtraFile { opened: opened.lock(*access)?, grows: file.grows, plain });
        }
        add_files(image, others)?;
    }
    refuse_same_bytes(images)
}

/// Let these be the other files of an image, and ask for its facts again.
fn add_files(image: &mut ChainImage<'_>, mut others: Vec<ExtraFile>) -> Result<(), Error> {
    image.files.append(&mut others);
    let others: Vec<&dyn ImageRead> = image.files.iter().map(|file| &file.opened.file as &dyn ImageRead).collect();
    let files = ImageFiles { first: &image.opened.file, others: &others };
    let path = &image.opened.path;
    let failed = |error| Error::identify(path, &IdentifyError::Plugin(error));
    let facts = image.plugin.facts(files).map_err(failed)?;
    if facts.backing != image.facts.backing {
        let clause = "was changed while it was looked at: make sure that nothing else writes to it";
        return Err(Error::image(path, ErrorCode::HeaderMismatch, clause));
    }
    image.facts = facts;
    Ok(())
}

/// The other files of an image that was just created, which are open already and have no names yet, are these.
///
/// # Errors
/// [`ErrorCode::PluginRefused`] if the image names other files than its plugin has laid out.
pub fn add_new_files(image: &mut ChainImage<'_>, made: Vec<OpenedFile>) -> Result<(), Error> {
    let path = &image.opened.path;
    let failed = |error| Error::identify(path, &IdentifyError::Plugin(error));
    let named = image.plugin.files(&image.opened.file).map_err(failed)?;
    let same = named.len() == made.len()
        && named.iter().zip(&made).all(|(named, made)| made.name.as_bytes() == named.name.as_slice());
    if !same {
        let clause = format!("names other files than the {} plugin has made", image.plugin.name());
        return Err(Error::image(path, ErrorCode::PluginRefused, clause));
    }
    let files = named.iter().zip(made);
    let files =
        files.map(|(named, opened)| ExtraFile { opened, grows: named.grows, plain: named.format == "raw" }).collect();
    add_files(image, files)
}

/// Refuse a loop device on another file of the chain: what is written through the one changes the other.
fn refuse_same_bytes(images: &[FilesOf<'_, '_, '_>]) -> Result<(), Error> {
    let opened = || {
        images.iter().flat_map(|FilesOf { image, .. }| {
            std::iter::once(&image.opened).chain(image.files.iter().map(|file| &file.opened))
        })
    };
    let files: HashSet<Identity> = opened().map(|opened| opened.identity).collect();
    match opened().find(|opened| opened.below.is_some_and(|below| files.contains(&below))) {
        None => Ok(()),
        Some(device) => {
            let clause = "is a loop device on another file of this chain: detach it, and use the file itself";
            Err(Error::image(&device.path, ErrorCode::ChainLoop, clause))
        }
    }
}
