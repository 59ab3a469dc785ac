//! Going down a backing chain, from the image that records a name to the file behind it, in the same way for every command.
//!
//! The records of the images define the chain. A path of the operator only selects one of its files, and never determines where
//! the next one is looked for.

use super::access::Access;
use super::advice::RecordedRole;
use super::chain_image::ChainImage;
use super::gate::{Gate, Located};
use super::identify::Recorded;
use super::open::OpenedFile;
use super::proven::ParentSearch;
use crate::cancel::Cancel;
use crate::error::Error;
use crate::lookup::Identity;
use crate::plugins::Registry;
use instar_guest_abi::ErrorCode;
use instar_plugin_api::{BackingPointer, ImageFacts};
use std::path::Path;

/// A way down a chain.
pub struct Descent<'r, 'g> {
    registry: &'r Registry,
    gate: &'g Gate,
    /// The image that the operator named, for messages about the chain as a whole.
    first: &'g Path,
    /// The images that it has come by.
    seen: Vec<Identity>,
    /// A file that the operator names, and the format that it has then if the image above records none.
    believed: Option<(Identity, &'g str)>,
    /// How many more images there may be, and how many in all.
    room: usize,
    most: usize,
    /// The handle that ends a search for a parent.
    cancel: &'g Cancel,
}

/// Whether the format of an image cannot record a parent, neither by name nor by identity. Only the operator knows the parent
/// then, and without their word the image has none.
#[must_use]
pub fn parent_is_unrecorded(facts: &ImageFacts) -> bool {
    let nameless = facts.backing.as_ref().into_option().is_some_and(|pointer| pointer.names().all(<[u8]>::is_empty));
    nameless && facts.parent_identity_unique && facts.parent_identity.is_empty()
}

/// The backing pointer of an image, if it leads anywhere.
fn pointer(facts: &ImageFacts) -> Option<&BackingPointer> {
    facts.backing.as_ref().into_option().filter(|_| !parent_is_unrecorded(facts))
}

impl<'r, 'g> Descent<'r, 'g> {
    /// Begin at the image `first` that the operator named, with at most `room` images below it.
    #[must_use]
    pub fn new(registry: &'r Registry, gate: &'g Gate, first: &'g Path, room: usize, cancel: &'g Cancel) -> Self {
        Self { registry, gate, first, seen: Vec::new(), believed: None, room, most: room, cancel }
    }

    /// Believe the operator about the format of a file, if the image above it records none.
    #[must_use]
    pub fn believing(self, believed: Option<(Identity, &'g str)>) -> Self {
        Self { believed, ..self }
    }

    /// Record that this image is part of the chain.
    pub fn passed(&mut self, image: Identity) {
        self.seen.push(image);
    }

    /// Locate the backing of an image, if it records one; `wanted` is the file that the operator named. Opens nothing but, where
    /// no recorded name leads to a file, those that may be it, to look at their headers.
    ///
    /// # Errors
    /// [`ErrorCode::ChainTooDeep`], [`ErrorCode::ChainLoop`], and what [`Gate::find`] gives.
    pub fn next(
        &mut self,
        image: &ChainImage<'_>,
        role: RecordedRole,
        access: Access,
        wanted: Option<Identity>,
    ) -> Result<Option<Located>, Error> {
        let Some(pointer) = pointer(&image.facts) else { return Ok(None) };
        let Self { registry, gate, cancel, .. } = *self;
        let search = ParentSearch { registry, gate, image, role, access, wanted, cancel };
        let located = self.gate.find_or(&image.recorder(role), pointer.names(), access, wanted, || search.find())?;
        self.step(image, located.identity())?;
        Ok(Some(located))
    }

    /// Whether what an image records leads to this file for a program that reads the image by itself: a name, or the file's place beside
    /// an image of a format that records none.
    #[must_use]
    pub fn is_led_to(&self, image: &ChainImage<'_>, file: &OpenedFile) -> bool {
        let Some(pointer) = pointer(&image.facts) else { return false };
        let recorder = image.recorder(RecordedRole::Ancestor);
        let named = self.gate.find(&recorder, pointer.names(), Access::ReadOnly, Some(file.identity));
        let beside = !recorder.takes_a_name() && file.holder.identity() == image.opened.holder.identity();
        beside || named.is_ok_and(|located| located.identity() == file.identity)
    }

    /// Locate the backing of an image that records no name of it, by its identity.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn next_without_name(
        &mut self,
        image: &ChainImage<'_>,
        role: RecordedRole,
        access: Access,
    ) -> Result<Option<Located>, Error> {
        let Self { registry, gate, cancel, .. } = *self;
        let search = ParentSearch { registry, gate, image, role, access, wanted: None, cancel };
        let Some(located) = search.find()? else { return Ok(None) };
        self.step(image, located.identity())?;
        Ok(Some(located))
    }

    /// Continue with the image that the operator named below `image`, because the recorded name does not resolve.
    ///
    /// # Errors
    /// [`ErrorCode::ChainTooDeep`], [`ErrorCode::ChainLoop`].
    pub fn step(&mut self, image: &ChainImage<'_>, identity: Identity) -> Result<(), Error> {
        if self.seen.contains(&identity) || identity == image.opened.identity {
            let clause = "the backing chain leads back to itself";
            return Err(Error::image(&image.opened.path, ErrorCode::ChainLoop, clause));
        }
        let Some(room) = self.room.checked_sub(1) else { return Err(self.too_deep()) };
        self.room = room;
        self.seen.push(identity);
        Ok(())
    }

    /// Open the file that [`next`](Self::next) found, for reading, and identify it.
    ///
    /// # Errors
    /// What opening, locking and probing give.
    pub fn open(
        &self,
        above: &ChainImage<'_>,
        located: &Located,
        role: RecordedRole,
        access: Access,
    ) -> Result<ChainImage<'r>, Error> {
        let opened = OpenedFile::located(located, &above.recorder(role), access)?.lock(access)?;
        let recorded = Recorded::by(above, located);
        let named = self.believed.filter(|(file, _)| recorded.format().is_none() && *file == located.identity());
        match named {
            Some((_, format)) => opened.identify_as(self.registry, Some(format), "-F"),
            None => opened.identify_recorded(self.registry, recorded),
        }
    }

    /// Identify an open file that will be written, as the format that the operator `named` or the recorded one.
    ///
    /// # Errors
    /// What probing gives.
    pub fn identify_target(
        &self,
        above: &ChainImage<'_>,
        located: &Located,
        opened: OpenedFile,
        named: Option<&str>,
    ) -> Result<ChainImage<'r>, Error> {
        opened.identify_target(self.registry, named, Recorded::by(above, located))
    }

    /// Do the same for a file of the operator's to which no recorded name leads.
    ///
    /// # Errors
    /// What probing gives.
    pub fn identify_unnamed(
        &self,
        above: &ChainImage<'_>,
        opened: OpenedFile,
        named: Option<&str>,
    ) -> Result<ChainImage<'r>, Error> {
        opened.identify_target(self.registry, named, Recorded::unnamed(above))
    }

    /// Open everything below an image, nearest first, for reading only.
    ///
    /// # Errors
    /// As [`next`](Self::next) and [`open`](Self::open).
    pub fn open_below(&mut self, image: &ChainImage<'_>, access: Access) -> Result<Vec<ChainImage<'r>>, Error> {
        let mut below: Vec<ChainImage<'r>> = Vec::new();
        self.passed(image.opened.identity);
        loop {
            let above = below.last().map_or(image, |lowest| lowest);
            let Some(located) = self.next(above, RecordedRole::Ancestor, access, None)? else { return Ok(below) };
            let next = self.open(above, &located, RecordedRole::Ancestor, access)?;
            below.push(next);
        }
    }

    fn too_deep(&self) -> Error {
        let clause = format!("the backing chain has more than {} layers below this image", self.most);
        Error::image(self.first, ErrorCode::ChainTooDeep, clause)
    }
}
