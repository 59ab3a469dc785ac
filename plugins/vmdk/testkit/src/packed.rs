//! A disk in two files as one image, for the conformance test, which knows images of one file: the descriptor, and behind it the
//! extent. What the driver asks of the extent's device goes to the place where it lies.

use instar_guest_sdk::abi::{device_flags, DeviceConfig, FileDevice, FileList, ImageId, ImageInfo, ParentStage};
use instar_guest_sdk::abi::{CheckSummary, FindingKind, Phase, PlanSummary, Request, RequestOp};
use instar_guest_sdk::{
    BlockIo, Content, DriverResult, Extent, Extents, FormatDriver, IoFailure, ReadBelow, Sink, Source,
};
use instar_vmdk_driver::{Vmdk, VmdkSink, VmdkSource};
use std::ops::Range;

/// Where the extent begins: behind a descriptor that is padded with zeroes.
pub const EXTENT: usize = 4096;
/// What the number of an extent's device has on that of its image.
const EXTENT_DEVICE: u32 = 1 << 20;

/// Content IDs of an image and of its parent, of which nobody asks whether they fit.
pub const ANY_IDS: (u32, u32) = (0x0bad_cafe, 0x0bad_beef);

/// A descriptor and its extent as one image, with the content IDs of the image and of its parent.
pub fn pack(kind: (&str, &str), (id, parent): (u32, u32), size: usize, extent: &[u8]) -> Vec<u8> {
    let (create_type, line) = kind;
    let mut image = format!(
        "# Disk DescriptorFile\r\nversion=1\r\nencoding=\"windows-1252\"\r\nCID={id:08x}\r\nparentCID={parent:08x}\r\n\
         createType=\"{create_type}\"\r\nparentFileNameHint=\"b\"\r\nRW {} {line} \"x\"\r\nddb.adapterType = \"lsilogic\"\r\n",
        size / 512
    )
    .into_bytes();
    image.resize(EXTENT, 0);
    image.extend_from_slice(extent);
    image
}

/// Whether an image has the descriptor that [`pack`] makes, whatever its content IDs are.
pub fn is_plain(image: &[u8], kind: (&str, &str), size: usize) -> bool {
    let without_ids = |image: &[u8]| {
        let text = String::from_utf8_lossy(&image[..EXTENT]).into_owned();
        let is_id = |line: &&str| {
            ["CID=", "parentCID="].iter().any(|key| {
                line.strip_prefix(key)
                    .is_some_and(|id| id.len() == 8 && id.bytes().all(|digit| digit.is_ascii_hexdigit()))
            })
        };
        text.split("\r\n").filter(|line| !is_id(line)).map(str::to_owned).collect::<Vec<_>>()
    };
    image.len() >= EXTENT && without_ids(image) == without_ids(&pack(kind, ANY_IDS, size, &[]))
}

/// Block I/O in which the extent of an image is a device of its own.
struct Shift<'a> {
    io: &'a mut dyn BlockIo,
    image: u32,
}

impl Shift<'_> {
    fn is_extent(&self, device: u32) -> bool {
        device == self.image + EXTENT_DEVICE
    }
}

impl BlockIo for Shift<'_> {
    fn submit(&mut self, requests: &mut [Request]) -> Result<(), IoFailure> {
        let mut shifted = requests.to_vec();
        for request in &mut shifted {
            if self.is_extent(request.device) && request.op != RequestOp::Flush as u32 {
                request.offset += EXTENT as u64;
            }
            if request.op == RequestOp::Copy as u32 && self.is_extent(request.src_device) {
                request.src_offset += EXTENT as u64;
            }
            for device in [&mut request.device, &mut request.src_device] {
                if *device == self.image + EXTENT_DEVICE {
                    *device = self.image;
                }
            }
        }
        let result = self.io.submit(&mut shifted);
        for (request, done) in requests.iter_mut().zip(&shifted) {
            (request.status, request.length) = (done.status, done.length);
            if request.op == RequestOp::NextData as u32 {
                let start = if self.is_extent(request.device) { EXTENT as u64 } else { 0 };
                request.offset = done.offset - start;
            }
        }
        result
    }

    fn heap_free(&self) -> usize {
        self.io.heap_free()
    }

    fn enter(&mut self, phase: Phase) {
        self.io.enter(phase);
    }
}

/// What the driver is told of an image: the descriptor's file, and that of the extent.
fn split(device: &DeviceConfig) -> DeviceConfig {
    let extent = FileDevice {
        flags: device.flags | device_flags::PRESENT,
        device: device.device + EXTENT_DEVICE,
        file_length: device.file_length - EXTENT as u64,
        max_length: device.max_length.saturating_sub(EXTENT as u64),
    };
    let files = FileList::of(Box::leak(Box::new([extent])));
    DeviceConfig { file_length: EXTENT as u64, files, ..*device }
}

/// Open an image as source.
///
/// # Errors
/// What the driver refuses.
pub fn source(io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<PackedSource> {
    let image = device.device;
    Ok(PackedSource { image, inner: Vmdk::open_source(&mut Shift { io, image }, &split(device))? })
}

/// Open an image as sink.
///
/// # Errors
/// What the driver refuses.
pub fn sink(io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<PackedSink> {
    let image = device.device;
    Ok(PackedSink { image, inner: Vmdk::open_sink(&mut Shift { io, image }, &split(device), has_backing)? })
}

/// The source of a packed image.
pub struct PackedSource {
    image: u32,
    inner: VmdkSource,
}

impl Source for PackedSource {
    fn info(&self) -> ImageInfo {
        self.inner.info()
    }

    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        self.inner.verify(&mut Shift { io, image: self.image }, will_empty)
    }

    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let mut found = Extents::with_room_for(out.room());
        let next = self.inner.extents(&mut Shift { io, image: self.image }, range, &mut found)?;
        for extent in found.iter() {
            let content = match extent.content {
                Content::Data { device, offset } if device == self.image + EXTENT_DEVICE => {
                    Content::Data { device: self.image, offset: offset + EXTENT as u64 }
                }
                content => content,
            };
            assert!(out.push(Extent { content, ..*extent }), "there is as much room");
        }
        Ok(next)
    }

    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, guest: u64, buffer: &mut [u8]) -> DriverResult<()> {
        self.inner.read(&mut Shift { io, image: self.image }, extent, guest, buffer)
    }

    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        self.inner.empty(&mut Shift { io, image: self.image })
    }

    fn identity(&self) -> Option<ImageId> {
        self.inner.identity()
    }

    fn follow_parent(&mut self, io: &mut dyn BlockIo, identity: &ImageId, stage: ParentStage) -> DriverResult<()> {
        self.inner.follow_parent(&mut Shift { io, image: self.image }, identity, stage)
    }

    fn check(
        &mut self,
        io: &mut dyn BlockIo,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<CheckSummary> {
        self.inner.check(&mut Shift { io, image: self.image }, finding)
    }
}

/// The sink of a packed image.
pub struct PackedSink {
    image: u32,
    inner: VmdkSink,
}

impl Sink for PackedSink {
    fn info(&self) -> ImageInfo {
        self.inner.info()
    }

    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        self.inner.plan(&mut Shift { io, image: self.image }, extents)
    }

    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        self.inner.planned(&mut Shift { io, image: self.image })
    }

    fn next_identity(&mut self, child: Option<&ImageId>) -> Option<ImageId> {
        self.inner.next_identity(child)
    }

    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        self.inner.write(&mut Shift { io, image: self.image }, extents, below)
    }

    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.inner.finish(&mut Shift { io, image: self.image })
    }
}
