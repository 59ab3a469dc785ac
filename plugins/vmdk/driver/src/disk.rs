//! A disk: its descriptor, and the extents that it consists of, each in a file or, of a disk in one file, the only one.

use crate::content_id::DescriptorPlace;
use crate::failures::at;
use crate::image::Image;
use crate::sesparse::SeSparse;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_sdk::abi::{device_flags, DeviceConfig, ErrorCode, FileDevice};
use instar_guest_sdk::{checked_end, overflow, BlockIo, DriverError, DriverResult};
use instar_vmdk_format::{DiskExtent, Storage, MAGIC, MAX_DESCRIPTOR_BYTES, SESPARSE_GRAIN_BYTES};

/// A flat extent: plain bytes of a file.
#[derive(Clone, Copy, Debug)]
pub struct Flat {
    pub device: u32,
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// Bytes of the file, and how many it may become.
    pub file_length: u64,
    pub longest: u64,
    /// It is a block device.
    pub is_device: bool,
}

/// How an extent is stored: `S` is what works on a sparse one.
#[derive(Debug)]
pub enum Body<S> {
    Sparse(S),
    /// Which is only read.
    SeSparse(SeSparse),
    Flat(Flat),
}

/// An extent of a disk.
#[derive(Debug)]
pub struct Part<S> {
    /// First guest byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    pub body: Body<S>,
}

impl<S> Part<S> {
    /// The first guest byte behind it.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    pub descriptor: DescriptorPlace,
    /// Ascending, without gaps.
    pub parts: Vec<Part<(Image, FileDevice)>>,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Grain size in bytes; 1 if all extents are flat.
    pub cluster_size: u64,
}

/// What the host saw is not there any more.
fn mismatch(device: u32, text: impl Into<String>) -> DriverError {
    DriverError::new(ErrorCode::HeaderMismatch, text).at(device, 0)
}

/// The file with the descriptor.
fn file_of(device: &DeviceConfig) -> FileDevice {
    let DeviceConfig { flags, device, file_length, max_length, .. } = *device;
    FileDevice { flags, device, file_length, max_length }
}

impl Disk {
    /// Read descriptor, headers and directories. `corrupt` is the code of what no image may say.
    ///
    /// # Errors
    /// [`ErrorCode::HeaderMismatch`] when the image is not what the host saw; corruption; I/O errors.
    pub fn open(io: &mut dyn BlockIo, device: &DeviceConfig, corrupt: ErrorCode) -> DriverResult<Self> {
        let mut magic = [0; 4];
        io.read(device.device, 0, &mut magic)?;
        let disk = if magic == MAGIC {
            Self::in_one_file(io, device, corrupt)?
        } else {
            Self::in_several_files(io, device, corrupt)?
        };
        let cluster_size = if disk.cluster_size == 1 { 0 } else { disk.cluster_size };
        if (disk.size, cluster_size) != (device.virtual_size, device.cluster_size) {
            let text = format!(
                "the header says {} bytes with grains of {cluster_size}, the host saw {} and {}",
                disk.size, device.virtual_size, device.cluster_size
            );
            return Err(mismatch(device.device, text));
        }
        Ok(disk)
    }

    fn in_one_file(io: &mut dyn BlockIo, device: &DeviceConfig, corrupt: ErrorCode) -> DriverResult<Self> {
        let file = file_of(device);
        let image = Image::open_hosted(io, &file, corrupt)?;
        let descriptor = DescriptorPlace::read(io, &file, image.descriptor_range()?, corrupt)?;
        if !descriptor.text.is_one_file() {
            return Err(mismatch(device.device, "the descriptor does not describe a disk in one file"));
        }
        let (size, cluster_size) = (image.layout.virtual_size(), image.layout.grain_bytes());
        let part = Part { start: 0, length: size, body: Body::Sparse((image, file)) };
        Ok(Self { descriptor, parts: vec![part], size, cluster_size })
    }

    fn in_several_files(io: &mut dyn BlockIo, device: &DeviceConfig, corrupt: ErrorCode) -> DriverResult<Self> {
        let number = device.device;
        if device.file_length > MAX_DESCRIPTOR_BYTES {
            return Err(mismatch(number, "the descriptor is longer than any"));
        }
        let descriptor = DescriptorPlace::read(io, &file_of(device), (0, device.file_length), corrupt)?;
        let extents = descriptor.text.disk_extents().map_err(at(corrupt, number, 0))?;
        let files = device.files.as_slice();
        if files.len() != extents.len() {
            let text = format!("the descriptor has {} extents, the host saw {}", extents.len(), files.len());
            return Err(mismatch(number, text));
        }
        let mut disk = Self { descriptor, parts: Vec::new(), size: 0, cluster_size: 1 };
        for (index, (extent, file)) in extents.iter().zip(files).enumerate() {
            let mut length = extent.length;
            let body = match extent.storage {
                Storage::Sparse => Body::Sparse((Image::open_hosted(io, file, corrupt)?, *file)),
                Storage::Cowd => Body::Sparse((Image::open_cowd(io, file, corrupt)?, *file)),
                Storage::SeSparse => Body::SeSparse(SeSparse::open(io, file, corrupt)?),
                Storage::Flat(offset) => Body::Flat(open_flat(extent, offset, file, corrupt)?),
            };
            match &body {
                Body::Sparse((Image { layout, .. }, _)) => {
                    // The disk was about to grow: see `grow`. The header counts, for QEMU reads that.
                    if extent.storage == Storage::Sparse && index + 1 == extents.len() {
                        length = length.min(layout.virtual_size());
                    }
                    let extent = &DiskExtent { length, ..extent.clone() };
                    disk.fits(extent, file, (layout.virtual_size(), layout.grain_bytes()), corrupt)?;
                }
                Body::SeSparse(SeSparse { header, .. }) => {
                    disk.fits(extent, file, (header.virtual_size(), SESPARSE_GRAIN_BYTES), corrupt)?;
                }
                Body::Flat(_) => {}
            }
            disk.parts.push(Part { start: extent.start, length, body });
            disk.size = extent.start.checked_add(length).ok_or_else(|| overflow("the size of the disk"))?;
        }
        Ok(disk)
    }

    /// Whether a sparse extent whose header gives this size and these grains is what the descriptor says, and goes with the
    /// extents before.
    fn fits(
        &mut self,
        extent: &DiskExtent,
        file: &FileDevice,
        (says, grain): (u64, u64),
        corrupt: ErrorCode,
    ) -> DriverResult<()> {
        if says != extent.length {
            let text =
                format!("the header says {says} bytes, the descriptor says {} bytes of this extent", extent.length);
            return Err(DriverError::new(corrupt, text).at(file.device, 12));
        }
        if self.cluster_size != 1 && self.cluster_size != grain {
            let text = format!("grains of {grain} bytes beside ones of {} are not supported", self.cluster_size);
            return Err(DriverError::new(ErrorCode::UnsupportedFormat, text).at(file.device, 20));
        }
        self.cluster_size = grain;
        Ok(())
    }

    /// The same with other workers on the sparse extents.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn map<S>(
        self,
        mut make: impl FnMut(Image, FileDevice) -> DriverResult<S>,
    ) -> DriverResult<(DescriptorPlace, Vec<Part<S>>)> {
        let part = |part: Part<(Image, FileDevice)>| {
            let body = match part.body {
                Body::Sparse((image, file)) => Body::Sparse(make(image, file)?),
                Body::SeSparse(image) => Body::SeSparse(image),
                Body::Flat(flat) => Body::Flat(flat),
            };
            Ok(Part { start: part.start, length: part.length, body })
        };
        Ok((self.descriptor, self.parts.into_iter().map(part).collect::<DriverResult<_>>()?))
    }
}

fn open_flat(extent: &DiskExtent, offset: u64, file: &FileDevice, corrupt: ErrorCode) -> DriverResult<Flat> {
    if checked_end(offset, extent.length, file.file_length).is_none() {
        let text = format!(
            "the file of {} bytes is too short for the {} bytes at byte {offset} that the descriptor says",
            file.file_length, extent.length
        );
        return Err(DriverError::new(corrupt, text).at(file.device, file.file_length));
    }
    let FileDevice { flags, device, file_length, max_length: longest } = *file;
    Ok(Flat { device, offset, file_length, longest, is_device: flags & device_flags::FIXED_LENGTH != 0 })
}
