//! A format, as its tests know it.

use super::layer::{Held, Layer, SECTOR};
use crate::{BlockIo, DriverResult, FormatDriver, Parent, Sink, Source};
use alloc::boxed::Box;
use alloc::vec::Vec;
use instar_guest_abi::{DeviceConfig, ImageId, ImageInfo};

/// A driver, and a reader of its images that shares no code with it, so that no mistake can be in both.
///
/// Functions that take `image` may panic if that makes no image of the format.
///
/// # Example
///
/// A kit for a format of plain bytes, whose images hold every byte of the disk. `D` is the driver on trial.
///
/// ```
/// use core::marker::PhantomData;
/// use instar_guest_sdk::abi::{DeviceConfig, ImageInfo};
/// use instar_guest_sdk::conformance::{sink_of, source_of, verify_drawn, Builder, Held, ImageKit, Layer};
/// use instar_guest_sdk::crash::Crashes;
/// use instar_guest_sdk::{BlockIo, DriverResult, FormatDriver, Sink, Source};
///
/// struct Plain<D>(PhantomData<D>);
///
/// impl<D: FormatDriver<Source: 'static, Sink: 'static> + Sync> ImageKit for Plain<D> {
///     fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
///         source_of::<D>(io, device)
///     }
///
///     fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
///         sink_of::<D>(io, device, has_backing)
///     }
///
///     fn info(&self, image: &[u8]) -> ImageInfo {
///         ImageInfo { virtual_size: image.len() as u64, cluster_size: 1 }
///     }
///
///     fn content(&self, image: &[u8], _below: Option<&[u8]>) -> Vec<u8> {
///         image.to_vec()
///     }
/// }
///
/// impl<D: FormatDriver<Source: 'static, Sink: 'static> + Sync> Builder for Plain<D> {
///     fn cluster(&self) -> u64 {
///         512
///     }
///
///     fn build(&self, layer: &Layer) -> Vec<u8> {
///         layer.content(&[])
///     }
///
///     fn states(&self) -> &[Held] {
///         &[Held::Data]
///     }
/// }
///
/// fn conforms<D: FormatDriver<Source: 'static, Sink: 'static> + Sync>(driver: PhantomData<D>) {
///     verify_drawn(&Plain(driver), 0..4, Crashes { drawn: 1, seed: 1 });
/// }
/// ```
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

    /// Return virtual size and cluster size of an image, as the host half's facts have them.
    fn info(&self, image: &[u8]) -> ImageInfo;

    /// Return the bytes that a guest reads of an image over the bytes `below`.
    fn content(&self, image: &[u8], below: Option<&[u8]>) -> Vec<u8>;

    /// Return the content of each internal snapshot, with nothing below.
    fn snapshots(&self, image: &[u8]) -> Vec<Vec<u8>> {
        let _ = image;
        Vec::new()
    }

    /// Return whether an image is consistent, with lost space at worst. In an image that [is dirty](ImageKit::is_dirty),
    /// ignore the inconsistencies that a dirty bit announces.
    fn is_sound(&self, image: &[u8]) -> bool {
        let _ = image;
        true
    }

    /// Return whether an image says that it was not closed cleanly.
    fn is_dirty(&self, image: &[u8]) -> bool {
        let _ = image;
        false
    }

    /// Whether the format is a source: its images can be read.
    fn has_source(&self) -> bool {
        true
    }

    /// Whether a commit can empty images of the format.
    fn can_empty(&self) -> bool {
        self.has_source()
    }

    /// Whether the format is a sink: data can be committed into its images.
    fn has_sink(&self) -> bool {
        true
    }

    /// Whether an image can grow during a commit into it.
    fn can_grow(&self) -> bool {
        false
    }
}

/// A format of which the harness can make images. The example of [`ImageKit`] has one.
pub trait Builder: ImageKit {
    /// Cluster size in bytes of the images that [`build`](Builder::build) makes. A small one makes quick tests.
    fn cluster(&self) -> u64;

    /// Number of bytes of which each disk's size is a multiple: a sector, or a cluster if no disk of the format ends within one.
    fn unit(&self) -> u64 {
        SECTOR
    }

    /// Make an image that holds the clusters of `layer`: their bytes come from [`Layer::bytes`].
    fn build(&self, layer: &Layer) -> Vec<u8>;

    /// States that a cluster of the format can have. A format that cannot mark a cluster as zero leaves [`Held::Zero`] out.
    fn states(&self) -> &[Held] {
        &[Held::Nothing, Held::Data, Held::Zero]
    }
}

/// The record that an image keeps of its parent. A field for which the format has no place is empty.
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
///
/// # Example
///
/// A format whose header has 64 bytes at offset 32 for the parent's name, and records nothing else of it:
///
/// ```
/// use instar_guest_sdk::conformance::Recorded;
/// use instar_guest_sdk::Parent;
///
/// /// `ParentKit::recorded`
/// fn recorded(image: &[u8]) -> Option<Recorded> {
///     let name: Vec<u8> = image.get(32..96)?.iter().copied().take_while(|byte| *byte != 0).collect();
///     (!name.is_empty()).then(|| Recorded { names: vec![name], ..Recorded::default() })
/// }
///
/// /// `ParentKit::expected`
/// fn expected(parent: &Parent<'_>) -> Recorded {
///     Recorded { names: vec![parent.name.to_vec()], ..Recorded::default() }
/// }
///
/// let mut image = vec![0; 512];
/// assert_eq!(recorded(&image), None);
/// image[32..42].copy_from_slice(b"base.qcow2");
/// let parent = Parent { name: b"base.qcow2", format: "qcow2", identity: None, virtual_size: 1 << 20 };
/// assert_eq!(recorded(&image), Some(expected(&parent)));
/// ```
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
