//! The children of an overlay get the backing as their parent, once that holds all that they read through the overlay.

use crate::{BlockIo, DriverError, DriverResult, Parent, Source};
use alloc::boxed::Box;
use instar_guest_abi::ImageId;

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
    /// The images, each by itself a child of the overlay.
    pub children: &'a [Relinked<'c>],
    /// Name of the backing's format.
    pub format: &'a str,
    /// The backing's identity before the commit, if it has one.
    pub identity: Option<ImageId>,
}

impl Relinks<'_, '_> {
    /// No image.
    pub const NONE: Relinks<'static, 'static> = Relinks { children: &[], format: "", identity: None };

    fn parent<'p>(&'p self, name: &'p [u8], identity: Option<ImageId>, virtual_size: u64) -> Parent<'p> {
        Parent { name, format: self.format, identity, virtual_size }
    }

    /// Verify that all of them can name the backing: one that gets the identity `next`, or keeps its own, and is
    /// `virtual_size` bytes long then. Changes nothing.
    pub(crate) fn plan(&self, io: &mut dyn BlockIo, next: Option<ImageId>, virtual_size: u64) -> DriverResult<()> {
        self.children.iter().try_for_each(|child| {
            let parent = self.parent(child.name, next.or(self.identity), virtual_size);
            child.planned(io, &parent).map(drop)
        })
    }

    /// Have them name it, one after the other. A crash leaves some that name the overlay and some that name the backing, which
    /// read the same through either; running it again does the rest.
    pub(crate) fn set(
        &self,
        io: &mut dyn BlockIo,
        next: Option<ImageId>,
        virtual_size: u64,
        done: &mut dyn FnMut(usize),
    ) -> DriverResult<()> {
        for (number, child) in self.children.iter().enumerate() {
            done(number);
            let parent = self.parent(child.name, next.or(self.identity), virtual_size);
            child.planned(io, &parent)?.set_parent(io).map_err(|error| child.is_about(error))?;
        }
        Ok(())
    }
}
