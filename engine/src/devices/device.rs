//! The devices of one commit, by number.

use super::file::{Access, FileIdentity, ImageFile};
use instar_guest_abi::{device_flags, DEVICE_OUTPUT};

/// An image as the guest may use it.
#[derive(Debug)]
pub struct Device {
    pub(super) image: ImageFile,
    pub(super) writable: bool,
    pub(super) bound: u64,
    pub(super) length: u64,
    /// Something was written since the last flush.
    pub(super) dirty: bool,
    pub(super) changed: bool,
}

impl Device {
    /// A device that is only read.
    #[must_use]
    pub fn read_only(image: ImageFile) -> Self {
        let length = image.initial_length();
        Self { image, writable: false, bound: length, length, dirty: false, changed: false }
    }

    /// A device that is read and written, and may become at most `bound` bytes long, or stay as long as it is. A block
    /// device does not grow.
    #[must_use]
    pub fn writable(image: ImageFile, bound: u64) -> Self {
        let writable = image.access() == Access::ReadWrite;
        let length = image.initial_length();
        let limit = i64::MAX.unsigned_abs();
        let bound = if image.is_block_device() { length } else { bound.max(length).min(limit) };
        Self { image, writable, bound, length, dirty: false, changed: false }
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &ImageFile {
        &self.image
    }

    /// Whether the guest may change it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The longest that it may become, in bytes.
    #[must_use]
    pub fn bound(&self) -> u64 {
        self.bound
    }

    /// Length in bytes now.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether the guest has changed it.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.changed
    }

    /// Its bits of [`device_flags`].
    #[must_use]
    pub fn flags(&self) -> u32 {
        let mut flags = device_flags::PRESENT;
        if self.writable {
            flags |= device_flags::WRITABLE;
        }
        if self.image.is_block_device() {
            flags |= device_flags::FIXED_LENGTH;
        }
        flags
    }

    /// Note a change that reaches to byte `end`.
    pub(super) fn note_change(&mut self, end: u64) {
        self.dirty = true;
        self.changed = true;
        self.length = self.length.max(end);
    }
}

/// The devices of one commit, by number: the layers from slot 0 on, and the output.
#[derive(Debug, Default)]
pub struct DeviceSet {
    slots: Vec<Option<Device>>,
}

impl DeviceSet {
    /// These layers, from slot 0 on, and the output.
    #[must_use]
    pub fn new(layers: Vec<Device>, output: Option<Device>) -> Self {
        let count = usize::try_from(DEVICE_OUTPUT).unwrap_or(0);
        let mut slots: Vec<Option<Device>> = layers.into_iter().map(Some).take(count).collect();
        slots.resize_with(count, || None);
        slots.push(output);
        Self { slots }
    }

    /// The device of this number.
    #[must_use]
    pub fn get(&self, number: u32) -> Option<&Device> {
        self.slots.get(usize::try_from(number).ok()?)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut Device> {
        self.slots.get_mut(usize::try_from(number).ok()?)?.as_mut()
    }

    /// All devices, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Device)> {
        (0u32..).zip(&self.slots).filter_map(|(number, slot)| slot.as_ref().map(|device| (number, device)))
    }

    /// Whether two of them are the same file.
    #[must_use]
    pub fn has_duplicates(&self) -> bool {
        let mut seen: Vec<FileIdentity> = self.iter().map(|(_, device)| device.image.identity()).collect();
        let count = seen.len();
        seen.sort_unstable_by_key(|identity| (identity.device, identity.inode));
        seen.dedup();
        seen.len() != count
    }
}
