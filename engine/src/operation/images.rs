//! Opening the images of an operation, and what they are to it once they are open.

use super::session::Session;
use crate::error::Error;
use crate::image::{Access, ChainImage, Gate, NamedFile};
use crate::plugins::Registry;
use instar_guest_abi::{ErrorCode, MemberRole};
use std::path::Path;

/// The files that the operator names.
#[derive(Debug)]
pub struct Named {
    /// The image that the operation works on: recorded names may lead into its directory.
    pub image: NamedFile,
    /// Another image of its chain, whose directory the names below may lead into as well.
    pub base: Option<NamedFile>,
}

impl Named {
    /// Nothing but the image that the operation works on.
    #[must_use]
    pub fn image(path: &Path) -> Self {
        Self { image: NamedFile::new(path), base: None }
    }
}

/// What the images of an operation are opened with.
#[derive(Debug)]
pub struct Opener<'r, 'o> {
    /// The plugins.
    pub registry: &'r Registry,
    /// Who is told what was found.
    pub session: &'o Session,
    /// The files that the operator names.
    pub named: &'o Named,
    /// Where the names that the first image records may lead.
    pub gate: &'o Gate,
    /// Where the names that the images below it record may lead.
    pub below: &'o Gate,
    /// How what is to be changed is opened.
    pub access: Access,
}

impl<'r> Opener<'r, '_> {
    /// Open the image that the operator names, to be read: of the `format` that the operator names, or of the one that it
    /// looks like.
    ///
    /// # Errors
    /// What opening, locking and probing give.
    pub fn open_named(&self, format: Option<&str>) -> Result<ChainImage<'r>, Error> {
        let opened = self.named.image.open(self.access, ErrorCode::ImageNotFound)?.lock(self.access)?;
        opened.identify_as(self.registry, format)
    }
}

/// An image that is read, and what it is to the operation.
pub type Slot<'r> = (MemberRole, ChainImage<'r>);

/// The images of an operation, open.
#[derive(Debug, Default)]
pub struct ImageSet<'r> {
    /// Those that are read, the top-most first. Those with [`MemberRole::Below`] are below the target.
    pub slots: Vec<Slot<'r>>,
    /// The image that is written.
    pub target: Option<ChainImage<'r>>,
}

impl<'r> ImageSet<'r> {
    /// Images that are only read, the top-most first.
    #[must_use]
    pub fn read(images: impl IntoIterator<Item = ChainImage<'r>>) -> Self {
        Self { slots: images.into_iter().map(|image| (MemberRole::Read, image)).collect(), target: None }
    }

    /// The images with a role that `wanted` holds of, the top-most first.
    pub fn of_role(&self, wanted: impl Fn(MemberRole) -> bool) -> impl Iterator<Item = &ChainImage<'r>> {
        self.slots.iter().filter(move |(role, _)| wanted(*role)).map(|(_, image)| image)
    }

    /// All images in the order of the chain.
    #[must_use]
    pub fn chain(&self) -> Vec<&ChainImage<'r>> {
        let above = self.of_role(|role| role != MemberRole::Below);
        above.chain(&self.target).chain(self.of_role(|role| role == MemberRole::Below)).collect()
    }
}

/// To which lengths files may grow, in bytes, the files of an image together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    /// Those of the target.
    pub target: u64,
    /// Those of the image that is emptied, which a repair may have to lengthen first.
    pub emptied: u64,
}
