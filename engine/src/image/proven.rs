//! Finding the parent of an image by the identity that the image records of it, where no recorded name leads to a file.
//!
//! A VDI records no name at all, and the names in other images are those of another machine: a drive letter, a name in other
//! case, a file that was renamed since. The search covers the image's own directory and those that the operator allowed. A file
//! that it finds passes the [gate](Gate) under its name there, as if the image recorded that name: an image that may choose a
//! file by its identity gains nothing that it could not have by a name.
//!
//! Only an identity that changes with the content proves enough. The unique ID of a VHD is also that of each copy of the
//! parent, the backup of last year included, and nobody may write into one of those because the parent is not there.

use super::access::Access;
use super::advice::RecordedRole;
use super::chain_image::ChainImage;
use super::gate::{Gate, Located};
use super::scan::Scan;
use crate::cancel::Cancel;
use crate::error::Error;
use crate::escape::escape_path;
use crate::lookup::{Directory, Identity};
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;
use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The files that have the identity.
#[derive(Default)]
struct Found {
    taken: Vec<(PathBuf, Located)>,
    /// One that an image may not choose, and why.
    refused: Option<(PathBuf, Error)>,
}

/// A search for the parent of an image.
#[derive(Clone, Copy, Debug)]
pub struct ParentSearch<'s> {
    /// The plugins.
    pub registry: &'s Registry,
    /// What the parent has to pass.
    pub gate: &'s Gate,
    /// The image whose parent is looked for.
    pub image: &'s ChainImage<'s>,
    /// The part of the parent in the command.
    pub role: RecordedRole,
    /// The way to open it.
    pub access: Access,
    /// A file that the operator named: of several that may be the parent, it is the one.
    pub wanted: Option<Identity>,
    /// The handle that ends it.
    pub cancel: &'s Cancel,
}

impl ParentSearch<'_> {
    /// Find the parent; `None` if the image records no identity that only its parent has, or no file has it. Opens files only to
    /// look at their headers.
    ///
    /// # Errors
    /// [`ErrorCode::BackingNotFound`] if several files have the identity; [`ErrorCode::WriteTargetNotAllowed`] if only one has it that
    /// an image may not choose: a hidden file, or an executable one that is to be written; [`ErrorCode::Interrupted`].
    pub fn find(&self) -> Result<Option<Located>, Error> {
        let facts = &self.image.facts;
        if !facts.parent_identity_unique || facts.parent_identity.is_empty() {
            return Ok(None);
        }
        let own = &self.image.opened.directory;
        let mut found = Found::default();
        let mut seen: HashSet<Identity> = self.image.all_files().map(|file| file.identity).collect();
        let mut listed: HashSet<Identity> = HashSet::new();
        for directory in std::iter::once(own).chain(self.gate.roots().directories()) {
            if listed.insert(directory.identity()) {
                self.look_in(directory, directory.identity() == own.identity(), &mut seen, &mut found)?;
            }
        }
        let Found { mut taken, refused } = found;
        if let Some(named) = taken.iter().position(|(_, located)| located.is_named_by_operator()) {
            return Ok(Some(taken.swap_remove(named).1));
        }
        if let (true, Some((path, error))) = (taken.is_empty(), refused) {
            let clause = format!(
                "its parent has no file of the recorded name, and '{}', which has the parent's identity, is not taken ({error})",
                escape_path(&path)
            );
            return Err(Error::image(&self.image.opened.path, error.code, clause));
        }
        let mut names = taken.iter().map(|(path, _)| format!("'{}'", escape_path(path))).collect::<Vec<_>>();
        if names.len() > 1 {
            names.sort();
            let clause = format!(
                "its parent has no file of the recorded name, and several files have the parent's identity: {}; leave the \
                 one that it was made on in its place, and move the copies to another directory",
                names.join(", ")
            );
            return Err(Error::image(&self.image.opened.path, ErrorCode::BackingNotFound, clause));
        }
        Ok(taken.pop().map(|(_, located)| located))
    }

    fn look_in(
        &self,
        directory: &Directory,
        beside: bool,
        seen: &mut HashSet<Identity>,
        found: &mut Found,
    ) -> Result<(), Error> {
        let Self { registry, gate, image, role, access, wanted, cancel } = *self;
        // An identity that changes with the content is known to its own format only; and other images may have long headers.
        let scan = Scan { registry, cancel, only: Some(image.plugin) };
        // A directory that cannot be listed holds nothing that could be found.
        scan.images_in(directory, seen, |other| {
            let next = other.plugin.next_identity(&other.facts, &image.facts);
            if next.is_empty() || !image.facts.is_proven_child_of(&other.facts, &next) {
                return Ok(false);
            }
            let path = directory.path().join(&other.name);
            let name = if beside { other.name.as_bytes() } else { path.as_os_str().as_bytes() };
            // Another file may have its name by now.
            match gate.find(&image.recorder(role), [name], access, wanted) {
                Ok(located) if located.identity() == other.identity => found.taken.push((path, located)),
                Err(error) if error.code == ErrorCode::WriteTargetNotAllowed => {
                    found.refused.get_or_insert((path, error));
                    return Ok(false);
                }
                _ => return Ok(false),
            }
            Ok(true)
        })
        .map(|_| ())
    }
}
