//! A format, as its tests know it.

use super::layer::{Held, Layer};
use crate::{BlockIo, DriverResult, FormatDriver, Parent, Sink, Source};
use alloc::boxed::Box;
use alloc::vec::Vec;
use instar_guest_abi::{DeviceConfig, ImageId, ImageInfo};

/// A driver, and a reader of its images that shares no code with it: what one gets wrong, the other does not.
///
/// Functions that take `image` may panic if that makes no image of the format.
pub trait ImageKit: Sync {
    /// Open an image as source: [`source_of`] of the driver.
    ///
    /// # Errors
    /// What the driver refuses.
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>>;

    /// Open an image as sink: [`sink_of`] of the driver.
    ///
    /// # Errors
    /// What the driver refuses.
    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>>;

    /// What the host half says of an image.
    fn info(&self, image: &[u8]) -> ImageInfo;

    /// What a guest reads, over the bytes that are below.
    fn content(&self, image: &[u8], below: Option<&[u8]>) -> Vec<u8>;

    /// What each internal snapshot reads as over nothing.
    fn snapshots(&self, image: &[u8]) -> Vec<Vec<u8>> {
        let _ = image;
        Vec::new()
    }

    /// Whether an image is consistent: lost space at worst. What a dirty bit stands for does not count in an image that
    /// [is dirty](ImageKit::is_dirty).
    fn is_sound(&self, image: &[u8]) -> bool {
        let _ = image;
        true
    }

    /// Whether an image says that it was not closed cleanly.
    fn is_dirty(&self, image: &[u8]) -> bool {
        let _ = image;
        false
    }

    /// Whether the format is a source: its images can be read.
    fn has_source(&self) -> bool {
        true
    }

    /// Whether images can be committed, and so are emptied.
    fn can_empty(&self) -> bool {
        self.has_source()
    }

    /// Whether the format is a sink: its images can be committed into.
    fn has_sink(&self) -> bool {
        true
    }

    /// Whether images can grow when they are committed into.
    fn can_grow(&self) -> bool {
        false
    }
}

/// A format whose images can be made.
pub trait Builder: ImageKit {
    /// Bytes of a cluster of the images that are made: small ones make quick tests.
    fn cluster(&self) -> u64;

    /// An image that holds this. Its bytes are those of [`Layer::bytes`].
    fn build(&self, layer: &Layer) -> Vec<u8>;

    /// What images of the format can hold of a cluster.
    fn states(&self) -> &[Held] {
        &[Held::Nothing, Held::Data, Held::Zero]
    }
}

/// What an image records of its parent. What its format has no place for is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Its names, in the order in which they are tried.
    pub names: Vec<Vec<u8>>,
    /// Name of its format.
    pub format: Option<Vec<u8>>,
    /// Its identity.
    pub identity: Option<ImageId>,
}

/// A format whose images can get another parent.
pub trait ParentKit: ImageKit {
    /// What an image records of its parent, as the host half reads it; `None` if it has none.
    fn recorded(&self, image: &[u8]) -> Option<Recorded>;

    /// What an image is to record of this parent.
    fn expected(&self, parent: &Parent<'_>) -> Recorded;
}

/// [`ImageKit::open_source`] by a driver.
///
/// # Errors
/// As [`FormatDriver::open_source`].
pub fn source_of<D>(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>>
where
    D: FormatDriver<Source: 'static>,
{
    Ok(Box::new(D::open_source(io, device)?))
}

/// [`ImageKit::open_sink`] by a driver.
///
/// # Errors
/// As [`FormatDriver::open_sink`].
pub fn sink_of<D>(io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>>
where
    D: FormatDriver<Sink: 'static>,
{
    Ok(Box::new(D::open_sink(io, device, has_backing)?))
}
