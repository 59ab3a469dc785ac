//! The children of an overlay get the backing as their parent, once that holds all that they read through the overlay.

use crate::{BlockIo, DriverError, DriverResult, Parent, Source};
use alloc::boxed::Box;
use instar_guest_abi::{ImageId, Phase};

/// Opens an image as a source.
pub type OpenSource<'a> = dyn Fn(&mut dyn BlockIo) -> DriverResult<Box<dyn Source + 'a>> + 'a;

/// An image that is to name the backing.
pub struct Relinked<'a> {
    /// Open it. Of many images, no more than one is open at a time.
    pub open: Box<OpenSource<'a>>,
    /// Its device: errors that name none are about it.
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

/// The images that are to name the backing, and what they record of it besides its name.
pub struct Relinks<'a, 'c> {
    children: &'a [Relinked<'c>],
    format: &'a str,
    identity: Option<ImageId>,
    virtual_size: u64,
}

impl<'a, 'c> Relinks<'a, 'c> {
    /// Each of the `children` is above the overlay; `format` is the name of the backing's format, and `identity` what it has
    /// before the commit, if anything.
    #[must_use]
    pub const fn new(children: &'a [Relinked<'c>], format: &'a str, identity: Option<ImageId>) -> Self {
        Self { children, format, identity, virtual_size: 0 }
    }

    /// No image.
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

    /// Have them name it, one after the other, when a [commit](crate::commit::commit_before_relinking) that was no dry run is
    /// done; `done` is told how many do so. A crash leaves some that name the overlay and some that name the backing, which read
    /// the same through either; running it again does the rest.
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
