//! The images of an operation as devices: the number of each file, its maximum length, and its path.

use super::images::{Grants, ImageSet, Slot};
use crate::devices::{Cache, Device, Devices};
use crate::error::{Error, Role};
use crate::image::{ChainImage, OpenedFile};
use crate::plugins::{ImageRead, Plugin};
use crate::sandbox::{ModuleSpec, FIRST_FORMAT};
use instar_guest_abi::{
    device_flags, DeviceConfig, DeviceRole, ErrorCode, FileDevice, FileList, Member, MemberRole, DEVICE_OUTPUT,
    FILE_TABLE_ADDR, FIRST_FILE_DEVICE, MAX_CHAIN_DEVICES, PARENT_ROOM,
};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The file and the image behind each device.
#[derive(Debug, Default)]
pub struct DevicePaths {
    pub(crate) by_device: BTreeMap<u32, PathBuf>,
    /// Those that are block devices, which nothing makes longer.
    pub(crate) block_devices: BTreeSet<u32>,
    /// Name and version of the plugin whose driver reads the device.
    pub(crate) drivers: BTreeMap<u32, String>,
    pub(crate) first_files: Range<u32>,
    pub(crate) target_files: Range<u32>,
    /// The devices of the second view's top-most image: that of its own file, and those of the others.
    pub(crate) second: Option<(u32, Range<u32>)>,
    /// How many of the first slots are above the image that is written; 0 if none is.
    pub(crate) merged: u32,
    /// The images that get another parent.
    pub(crate) children: Range<u32>,
}

impl DevicePaths {
    /// Return the path of a device's file.
    #[must_use]
    pub fn get(&self, device: u32) -> Option<&Path> {
        self.by_device.get(&device).map(PathBuf::as_path)
    }

    /// Whether the device is a block device of the host.
    #[must_use]
    pub fn is_block_device(&self, device: u32) -> bool {
        self.block_devices.contains(&device)
    }

    /// Return the role of a device; `None` for the other files of an image that is only read. Without a target, the operation
    /// works on the first image.
    #[must_use]
    pub fn role(&self, device: u32) -> Option<Role> {
        let writes = self.merged != 0;
        match device {
            _ if self.first().any(|number| number == device) => Some(if writes { Role::Overlay } else { Role::Image }),
            _ if self.is_second(device) => Some(Role::Image),
            _ if writes && self.target().any(|number| number == device) => Some(Role::Backing),
            _ if device < self.merged => Some(Role::Between),
            _ if self.children.contains(&device) => Some(Role::Child),
            _ if device < DEVICE_OUTPUT => Some(Role::Ancestor),
            _ => None,
        }
    }

    /// What a flush, and a write, of these devices promises.
    ///
    /// # Errors
    /// [`ErrorCode::OpenFailed`] for a file system that knows no direct I/O.
    pub(crate) fn set_cache(&self, devices: &mut Devices, cache: Cache) -> Result<(), Error> {
        devices.set_cache(cache).map_err(|(number, error)| {
            let path = self.get(number).unwrap_or(Path::new(""));
            let clause =
                format!("cannot be used with O_DIRECT ({error}): its file system may not support it, use -t writeback");
            Error::image(path, ErrorCode::OpenFailed, clause)
        })
    }

    /// All devices but those of the image that is written.
    pub(crate) fn sources(&self) -> impl Iterator<Item = u32> + '_ {
        let written = |number: &u32| *number == DEVICE_OUTPUT || self.target_files.contains(number);
        self.by_device.keys().copied().filter(move |number| !written(number))
    }

    fn is_second(&self, device: u32) -> bool {
        self.second.as_ref().is_some_and(|(own, files)| device == *own || files.contains(&device))
    }

    /// Return name and version of the plugin whose driver reads a device.
    #[must_use]
    pub fn driver(&self, device: u32) -> Option<&str> {
        self.drivers.get(&device).map(String::as_str)
    }

    /// Return the device of the image that the operation works on: the top-most one, or the target if it is alone.
    #[must_use]
    pub fn own(&self) -> u32 {
        if self.is_alone() {
            DEVICE_OUTPUT
        } else {
            0
        }
    }

    /// Whether nothing is above the image that is written.
    fn is_alone(&self) -> bool {
        self.by_device.contains_key(&DEVICE_OUTPUT) && self.merged == 0
    }

    /// Iterate over the devices of the image that the operation works on.
    pub fn first(&self) -> impl Iterator<Item = u32> {
        let files = if self.is_alone() { &self.target_files } else { &self.first_files };
        std::iter::once(self.own()).chain(files.clone())
    }

    /// Iterate over the devices of the target.
    pub fn target(&self) -> impl Iterator<Item = u32> {
        std::iter::once(DEVICE_OUTPUT).chain(self.target_files.clone())
    }
}

/// The images of an operation as the guest sees them.
#[derive(Default)]
pub struct Attached<'r> {
    /// The devices.
    pub devices: Devices,
    /// The images as members in the guest's configuration.
    pub members: Vec<Member>,
    /// The other files of the images in the guest's configuration.
    pub files: Vec<FileDevice>,
    /// The plugins in play, in the order of their modules.
    pub plugins: Vec<&'r Plugin>,
    /// The file behind each device.
    pub paths: DevicePaths,
    /// Bytes of tables that a driver should hold for an image that is read.
    cache_bytes: u64,
}

/// Bytes of tables that the drivers of all images that are read may hold together: a third of the guest's heap.
const READ_CACHES: u64 = 16 << 20;

/// Attach the images as devices, opened before: the slots from 0 on, and the target as the output device; other files of the
/// images follow. Only the target and the slot of [`MemberRole::Empty`] may be written, with their files, and the own file of
/// an image that [`follows`](ChainImage::follows) its parent or gets another one.
///
/// # Errors
/// [`ErrorCode::ChainTooDeep`].
pub(super) fn attach(images: ImageSet<'_>, grants: Grants) -> Result<Attached<'_>, Error> {
    let ImageSet { slots, target, rebases, again } = images;
    let first = target.as_ref().or_else(|| slots.first().map(|slot| &slot.image));
    let path = first.map(|image| image.opened.path.clone()).unwrap_or_default();
    // Of those that get another parent, one is open at a time.
    let children = slots.iter().filter(|slot| slot.role == MemberRole::Relinked).count();
    let mut all = Attached::for_slots(slots.len(), children, &path)?;
    let is_above = |slot: &&Slot<'_>| !matches!(slot.role, MemberRole::Below | MemberRole::Relinked);
    let above = slots.iter().filter(is_above).count();
    all.paths.children = number(slots.len() - children)..number(slots.len());
    all.paths.merged = if target.is_some() { number(above) } else { 0 };
    let mut begins = (0, 0);
    for (index, Slot { role, group, image }) in slots.into_iter().enumerate() {
        let slot = number(index);
        if group != begins.0 {
            begins = (group, slot);
        }
        // Only a layer that is alone is emptied; the one next to the target may record which image that is.
        let (emptied, identity) = (role == MemberRole::Empty, image.follows);
        let device_role = match role {
            MemberRole::Relinked => DeviceRole::Child,
            _ if emptied || identity => DeviceRole::Overlay { emptied, identity },
            _ => DeviceRole::Read,
        };
        let longest = if emptied { grants.emptied } else { 0 };
        let (device, files) = all.attach(slot, image, device_role, longest);
        // The target is in the middle of the chain.
        let is_after = matches!(role, MemberRole::Below | MemberRole::Relinked);
        let depth = if is_after { slot + 1 } else { slot - begins.1 };
        all.members.push(Member { role: role as u32, group, depth, device, ..Member::default() });
        if slot == 0 {
            all.paths.first_files = files;
        } else if slot == begins.1 && target.is_none() {
            all.paths.second = Some((slot, files));
        }
    }
    for (group, slot) in again {
        // One device, whichever view it is seen in.
        if let Some(member) = all.members.get(slot).copied() {
            all.members.push(Member { group, ..member });
        }
    }
    if let Some(target) = target {
        let device_role = if rebases { DeviceRole::Rebased } else { DeviceRole::Target };
        let (mut device, files) = all.attach(DEVICE_OUTPUT, target, device_role, grants.target);
        device.cache_bytes = 0;
        device.flags |= if rebases { device_flags::KEEPS_IDENTITY } else { 0 };
        if grants.beyond_devices && device.flags & device_flags::FIXED_LENGTH != 0 {
            device.max_length = device.max_length.max(grants.target);
        }
        device.flags |= if grants.compress { device_flags::COMPRESS } else { 0 };
        all.paths.target_files = files;
        let member = Member { role: MemberRole::Write as u32, depth: number(above), device, ..Member::default() };
        all.members.insert(above, member);
    }
    Ok(all)
}

/// The device number of a slot, which is checked to be small.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

impl<'r> Attached<'r> {
    /// Make room for `count` images that are read, `children` of which are children of the overlay.
    fn for_slots(count: usize, children: usize, path: &Path) -> Result<Self, Error> {
        if count > MAX_CHAIN_DEVICES {
            let clause = format!("the chain has {count} layers; {MAX_CHAIN_DEVICES} are supported");
            return Err(Error::image(path, ErrorCode::ChainTooDeep, clause));
        }
        let at_once = (count - children).max(1) as u64;
        Ok(Self { cache_bytes: READ_CACHES / at_once, ..Self::default() })
    }

    /// Return the guest modules of the formats in play.
    #[must_use]
    pub fn modules(&self) -> Vec<ModuleSpec<'r>> {
        let module = |plugin: &&'r Plugin| {
            let elf = plugin.guest_module().elf.as_slice();
            ModuleSpec { name: plugin.name(), version: plugin.version(), elf }
        };
        self.plugins.iter().map(module).collect()
    }

    /// Attach an image under this number, and its files under the next ones that are free, which are returned. It may
    /// become `longest` bytes long at most, all its files together.
    fn attach(
        &mut self,
        number: u32,
        image: ChainImage<'r>,
        device_role: DeviceRole,
        longest: u64,
    ) -> (DeviceConfig, Range<u32>) {
        let ChainImage { opened, plugin, facts, files, snapshot, .. } = image;
        // A layer that only records its parent's identity keeps its length, and its other files stay as they are.
        let changes =
            matches!(device_role, DeviceRole::Target | DeviceRole::Rebased | DeviceRole::Overlay { emptied: true, .. });
        let growth = if changes { longest.saturating_sub(facts.file_length) } else { 0 };
        let unit = facts.cluster_size;
        let room =
            if device_role == DeviceRole::Child { Some((PARENT_ROOM, 1)) } else { changes.then_some((growth, unit)) };
        let first = self.files.len();
        for file in files {
            let number = FIRST_FILE_DEVICE + u32::try_from(self.files.len()).unwrap_or(u32::MAX - FIRST_FILE_DEVICE);
            let room = file.grows.then_some((growth, unit));
            let device =
                self.attach_file(number, file.opened, if changes { device_role } else { DeviceRole::Read }, room);
            self.files.push(device);
        }
        self.paths.drivers.insert(number, format!("{} {}", plugin.name(), plugin.version()));
        let main = self.attach_file(number, opened, device_role, room);
        let count = self.files.len() - first;
        let address = FILE_TABLE_ADDR + (first * size_of::<FileDevice>()) as u64;
        let config = DeviceConfig {
            flags: main.flags,
            device: number,
            module: self.module(plugin),
            snapshot,
            file_length: main.file_length,
            max_length: main.max_length,
            virtual_size: facts.virtual_size,
            cluster_size: facts.cluster_size,
            cache_bytes: self.cache_bytes,
            // SAFETY: the list stands there in the guest's memory, read-only to it; nothing looks at it here.
            files: unsafe { FileList::at(address, count as u64) },
        };
        let number = |index: usize| FIRST_FILE_DEVICE + u32::try_from(index).unwrap_or(0);
        (config, number(first)..number(first + count))
    }

    /// Attach one file. `room`: by how many bytes it may grow, and the unit in which it does: the rest of its last cluster,
    /// if that was cut short, is always granted.
    fn attach_file(
        &mut self,
        number: u32,
        opened: OpenedFile,
        device_role: DeviceRole,
        room: Option<(u64, u64)>,
    ) -> FileDevice {
        let writable = device_role != DeviceRole::Read;
        let mut flags = device_flags::PRESENT;
        flags |= if writable { device_flags::WRITABLE } else { 0 };
        flags |= if opened.block_device { device_flags::FIXED_LENGTH } else { 0 };
        let file_length = opened.file.length();
        let longest = room.map_or(file_length, |(growth, unit)| {
            let whole = file_length.checked_next_multiple_of(unit.max(1)).unwrap_or(file_length);
            whole.max(file_length.saturating_add(growth))
        });
        let device = Device::new(opened.file.into_file(), writable, file_length, longest, opened.block_device)
            .with_role(device_role);
        // What the host will hold the guest to, so that a driver that needs more says so before the first change.
        let max_length = device.max_length();
        self.devices.attach(number, device);
        self.paths.by_device.insert(number, opened.path);
        if opened.block_device {
            self.paths.block_devices.insert(number);
        }
        FileDevice { flags, device: number, file_length, max_length }
    }

    /// The index of a plugin's module.
    fn module(&mut self, plugin: &'r Plugin) -> u32 {
        let found = self.plugins.iter().position(|p| p.name() == plugin.name());
        let index = found.unwrap_or_else(|| {
            self.plugins.push(plugin);
            self.plugins.len() - 1
        });
        FIRST_FORMAT + u32::try_from(index).unwrap_or(u32::MAX - FIRST_FORMAT)
    }
}
