//! The images of one commit, their content, and the commit itself.

use super::kit::ImageKit;
use crate::commit::{commit, Commit, CommitFailure, Options, Outcome, Plan, Step};
use crate::crash::Files;
use crate::memory::MemoryDevices;
use crate::{BlockIo, DriverResult, ReadBelow};
use alloc::vec::Vec;
use instar_guest_abi::{device_flags, DeviceConfig, ImageInfo, DEVICE_OUTPUT};

/// Device number of the overlay.
pub const OVERLAY: u32 = 0;
/// Device number of the backing's own backing.
pub const ANCESTOR: u32 = 1;

/// A bound that no file reaches.
pub(super) const ANY_LENGTH: u64 = i64::MAX.cast_unsigned();

/// The images of a commit: an overlay, the backing into which it is committed, and optionally an image below that.
pub struct Fixture<'a> {
    /// The format of the overlay.
    pub overlay: &'a dyn ImageKit,
    /// The format of the backing and of its ancestor.
    pub backing: &'a dyn ImageKit,
    /// The images: [`OVERLAY`], [`DEVICE_OUTPUT`] and, if the backing has a backing, [`ANCESTOR`].
    pub files: Files,
}

/// What images read as.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Reading {
    pub overlay: Vec<u8>,
    pub backing: Vec<u8>,
    pub snapshots: Vec<Vec<u8>>,
}

/// What is below the backing, as bytes.
pub(super) struct Below(pub(super) Option<Vec<u8>>);

impl ReadBelow for Below {
    fn exists(&self) -> bool {
        self.0.is_some()
    }

    fn length(&self) -> u64 {
        self.0.as_ref().map_or(0, |bytes| bytes.len() as u64)
    }

    fn read(&mut self, _: &mut dyn BlockIo, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let bytes = self.0.as_deref().unwrap_or_default();
        let start = usize::try_from(guest_offset).unwrap_or(usize::MAX).min(bytes.len());
        let count = buffer.len().min(bytes.len() - start);
        buffer.fill(0);
        buffer[..count].copy_from_slice(&bytes[start..start + count]);
        Ok(())
    }
}

/// What the host tells the guest of an image that may become `longest` bytes long.
pub(super) fn device(kit: &dyn ImageKit, number: u32, image: &[u8], longest: u64) -> DeviceConfig {
    let ImageInfo { virtual_size, cluster_size } = kit.info(image);
    DeviceConfig {
        flags: device_flags::PRESENT | device_flags::WRITABLE,
        device: number,
        file_length: image.len() as u64,
        max_length: longest,
        virtual_size,
        cluster_size,
        ..DeviceConfig::default()
    }
}

fn file(files: &Files, device: u32) -> &[u8] {
    files.get(&device).map(Vec::as_slice).unwrap_or_default()
}

impl Fixture<'_> {
    fn below(&self, files: &Files) -> Option<Vec<u8>> {
        files.get(&ANCESTOR).map(|bytes| self.backing.content(bytes, None))
    }

    /// What the images read as.
    pub(super) fn read(&self, files: &Files) -> Reading {
        let backing = self.backing.content(file(files, DEVICE_OUTPUT), self.below(files).as_deref());
        let overlay = self.overlay.content(file(files, OVERLAY), Some(&backing));
        let mut snapshots = self.overlay.snapshots(file(files, OVERLAY));
        snapshots.extend(self.backing.snapshots(file(files, DEVICE_OUTPUT)));
        Reading { overlay, backing, snapshots }
    }

    /// Overlay and backing, each with its format.
    pub(super) fn images<'f>(&self, files: &'f Files) -> [(&dyn ImageKit, &'f [u8]); 2] {
        [(self.overlay, file(files, OVERLAY)), (self.backing, file(files, DEVICE_OUTPUT))]
    }

    /// Whether the overlay is longer than the backing, which may become as long.
    pub(super) fn grows(&self) -> bool {
        let [overlay, backing] = self.images(&self.files).map(|(kit, image)| kit.info(image).virtual_size);
        overlay > backing && self.backing.can_grow()
    }

    /// Commit on these devices, held to the host's rules: the backing may become `longest` bytes long.
    pub(super) fn commit(
        &self,
        io: &mut MemoryDevices,
        options: Options,
        longest: u64,
        plan: &mut Option<Plan>,
    ) -> Result<Outcome, CommitFailure> {
        let at = |error| CommitFailure { step: Step::Check, error };
        let [(_, overlay), (_, backing)] = self.images(&io.files);
        let overlay = device(self.overlay, OVERLAY, overlay, ANY_LENGTH);
        let backing = device(self.backing, DEVICE_OUTPUT, backing, longest);
        let mut below = Below(self.below(&io.files));
        io.hold_commit(&overlay, options.keep_overlay, &backing);
        let mut source = self.overlay.open_source(io, &overlay).map_err(at)?;
        let mut sink = self.backing.open_sink(io, &backing, below.exists()).map_err(at)?;
        let mut images = Commit { source: source.as_mut(), sink: sink.as_mut(), below: &mut below };
        let options = Options { resize_backing: self.grows(), ..options };
        commit(io, &mut images, options, &mut |event| {
            if let crate::commit::Event::Planned(planned) = event {
                *plan = Some(planned);
            }
        })
    }
}
