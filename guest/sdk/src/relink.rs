//! Giving the children of an overlay the backing as their parent, once it holds all that they read through the overlay.

use crate::{BlockIo, DriverError, DriverResult, Parent, Source};
use alloc::boxed::Box;
use instar_guest_abi::{ImageId, Phase};

/// Opens an image as a source.
pub type OpenSource<'a> = dyn Fn(&mut dyn BlockIo) -> DriverResult<Box<dyn Source + 'a>> + 'a;

/// An image that will name the backing.
pub struct Relinked<'a> {
    /// Opens it. Only one of the images is open at a time.
    pub open: Box<OpenSource<'a>>,
    /// Its device, to which errors without a device refer.
    pub device: u32,
    /// The backing's name, as the image is to record it.
    pub name: &'a [u8],
}

impl Relinked<'_> {
    /// Open it, and plan this parent.
    fn planned(&self, io: &mut dyn BlockIo, parent: &Parent<'_>) -> DriverResult<Box<dyn Source + '_>> {
        let mut source = (self.open)(io)?;
        source.plan_parent(io, Some(parent)).map_err(|error| self.is_about(error))?;
        Ok(source)
    }

    fn is_about(&self, error: DriverError) -> DriverError {
        DriverError { device: error.device.or(Some(self.device)), ..error }
    }
}

/// The images that will name the backing, and what they record of it in addition to its name.
pub struct Relinks<'a, 'c> {
    children: &'a [Relinked<'c>],
    format: &'a str,
    identity: Option<ImageId>,
    virtual_size: u64,
}

impl<'a, 'c> Relinks<'a, 'c> {
    /// Relink the `children`, each of which lies above the overlay; `format` is the name of the backing's format, and
    /// `identity` its identity before the commit, if it has one.
    #[must_use]
    pub const fn new(children: &'a [Relinked<'c>], format: &'a str, identity: Option<ImageId>) -> Self {
        Self { children, format, identity, virtual_size: 0 }
    }

    /// Relink no image.
    #[must_use]
    pub const fn none() -> Self {
        Self::new(&[], "", None)
    }

    fn parent<'p>(&'p self, child: &'p Relinked<'c>) -> Parent<'p> {
        let Self { format, identity, virtual_size, .. } = *self;
        Parent { name: child.name, format, identity, virtual_size }
    }

    /// Verify that all of them can name the backing: one that gets the identity `next`, or keeps its own, and is
    /// `virtual_size` bytes long then. Changes nothing.
    pub(crate) fn plan(&mut self, io: &mut dyn BlockIo, next: Option<ImageId>, virtual_size: u64) -> DriverResult<()> {
        (self.identity, self.virtual_size) = (next.or(self.identity), virtual_size);
        self.children.iter().try_for_each(|child| child.planned(io, &self.parent(child)).map(drop))
    }

    /// Make the children name the backing, in order, after a successful [commit](crate::commit::commit_before_relinking) that
    /// was not a dry run; calls `done` with the number that do. A crash leaves some children that name the overlay and some
    /// that name the backing, through which they read the same; running it again relinks the rest.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set(&self, io: &mut dyn BlockIo, done: &mut dyn FnMut(u64)) -> DriverResult<()> {
        if self.children.is_empty() {
            return Ok(());
        }
        // The backing holds, durably, what they read through the overlay: the host sees to it that this is true.
        io.enter(Phase::Children);
        for (count, child) in (1..).zip(self.children) {
            child.planned(io, &self.parent(child))?.set_parent(io).map_err(|error| child.is_about(error))?;
            done(count);
        }
        Ok(())
    }
}
