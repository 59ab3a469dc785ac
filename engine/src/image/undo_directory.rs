//! Where the undo logs of block devices lie: beside a device is no place for a file that a restart is to leave, so the operator, or
//! the configuration, names a directory.
//!
//! A log there is named after what the device *is*, and not after its name or number, which belong to another one after a restart, or
//! once a volume was removed and a new one was made: the UUID of the device mapper, the serial number of a disk, the file below a
//! loop device. The system tells it by sysfs.

use super::open::OpenedFile;
use crate::error::{reason, Error};
use crate::lookup::Directory;
use instar_guest_abi::ErrorCode;
use rustix::fs::{fstat, fstatfs, openat, Mode, OFlags};
use rustix::io::{retry_on_intr, Errno};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// `f_type` of file systems that a restart empties: tmpfs and ramfs (statfs(2)).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
/// In `st_mode` of a directory (inode(7)): every user can make and remove names in it …
const WRITTEN_BY_ALL: u32 = 0o002;
/// … but remove only names of files of their own.
const STICKY: u32 = 0o1000;
/// Bytes of an attribute in sysfs at most.
const ATTRIBUTE: usize = 4096;
/// Bytes of the digest that the name of a log shows.
const SHOWN: usize = 8;
/// Attributes of a disk that say which one it is, of whatever kind it may be.
const OF_DISK: [&str; 5] = ["wwid", "device/wwid", "serial", "device/serial", "md/uuid"];

/// The one of this process, which is confined for one command.
static USED: Mutex<Option<UndoDirectory>> = Mutex::new(None);

/// The directory of the undo logs of devices, and the system's word about those.
#[derive(Clone, Debug)]
pub struct UndoDirectory {
    directory: Directory,
    /// To list it.
    listed: Arc<OwnedFd>,
    /// `/sys`, if it is mounted.
    sys: Option<Directory>,
}

/// What a block device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceIdentity {
    /// What the system calls it now, without directory: another device may have the name tomorrow.
    pub name: OsString,
    /// SHA-256 of what tells it from every other, also after a restart.
    pub digest: [u8; 32],
}

impl DeviceIdentity {
    /// The name of its undo log.
    #[must_use]
    pub fn log_name(&self) -> OsString {
        let mut name = String::from(".device-");
        for byte in self.digest.iter().take(SHOWN) {
            let _ = write!(name, "{byte:02x}");
        }
        name.push_str(".instar-undo");
        name.into()
    }
}

/// From now on, look for the undo logs of devices in this directory.
///
/// # Errors
/// [`ErrorCode::OpenFailed`]; [`ErrorCode::BadUsage`] for one that a restart empties.
pub fn use_undo_directory(path: Option<&Path>) -> Result<Option<UndoDirectory>, Error> {
    let used = path.map(UndoDirectory::open).transpose()?;
    if let Ok(mut place) = USED.lock() {
        place.clone_from(&used);
    }
    Ok(used)
}

/// Where the undo logs of devices are looked for.
#[must_use]
pub fn undo_directory() -> Option<UndoDirectory> {
    USED.lock().ok().and_then(|used| used.clone())
}

impl UndoDirectory {
    fn open(path: &Path) -> Result<Self, Error> {
        let cannot = |errno: Errno| {
            let what = "cannot be used for undo logs";
            Error::io(path, ErrorCode::OpenFailed, what, &errno.into())
        };
        let directory = Directory::open(path).map_err(cannot)?.really();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let listed = retry_on_intr(|| openat(&directory, ".", flags, Mode::empty())).map_err(cannot)?;
        let system = fstatfs(&listed).map_err(cannot)?;
        if IN_MEMORY.contains(&system.f_type.cast_unsigned()) {
            let clause = "lies in memory, and a power loss takes the undo logs in it: name a directory on a disk";
            return Err(Error::image(path, ErrorCode::BadUsage, clause));
        }
        let stat = fstat(&listed).map_err(cannot)?;
        if stat.st_mode & WRITTEN_BY_ALL != 0 && stat.st_mode & STICKY == 0 {
            let clause = "is a directory in which every user can remove the undo logs of others: `chmod o-w` it";
            return Err(Error::image(path, ErrorCode::PermissionDenied, clause));
        }
        Ok(Self { directory, listed: Arc::new(listed), sys: Directory::open(Path::new("/sys")).ok() })
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// A descriptor that lists it.
    #[must_use]
    pub fn listed(&self) -> &OwnedFd {
        &self.listed
    }

    /// Where the system tells what devices are, if it does.
    #[must_use]
    pub fn sys(&self) -> Option<&Directory> {
        self.sys.as_ref()
    }

    /// Find out what an open block device is.
    ///
    /// # Errors
    /// [`ErrorCode::UnsupportedFormat`] for one that nothing tells from another after a restart.
    pub fn identify(&self, device: &OpenedFile) -> Result<DeviceIdentity, Error> {
        let refused = |why: &str| {
            let clause = format!(
                "is a block device that nothing tells from another one after a restart ({why}), so that no undo log can be of it: \
                 commit without --atomic"
            );
            Error::image(&device.path, ErrorCode::UnsupportedFormat, clause)
        };
        let failed = |errno: Errno| refused(&reason(&errno.into()).to_string());
        let stat = fstat(device.file.file()).map_err(failed)?;
        let sys = self.sys.as_ref().ok_or_else(|| refused("/sys is not there"))?;
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let place = sys.open_below(Path::new(&format!("dev/block/{major}:{minor}"))).map_err(failed)?;
        let mut said = identity_text(&place).ok_or_else(|| refused("it has no UUID, and no serial number"))?;
        // Two file systems may have a file of one inode; a copy of a disk may have its serial number.
        if let Some(inode) = device.below.and_then(|below| below.inode()) {
            let _ = write!(said, " inode {inode}");
        }
        let name = attribute(&place, "dm/name").unwrap_or_else(|| kernel_name(&place));
        Ok(DeviceIdentity { name: OsString::from(name), digest: Sha256::digest(said.as_bytes()).into() })
    }
}

/// The kernel's name of a device: that of its directory.
fn kernel_name(place: &Directory) -> String {
    let real = place.clone().really();
    real.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What an attribute in sysfs says, if it says anything.
fn attribute(place: &Directory, name: &str) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(retry_on_intr(|| openat(place, name, flags, Mode::empty())).ok()?);
    let mut bytes = vec![0; ATTRIBUTE];
    let length = file.read_at(&mut bytes, 0).ok()?;
    let text = String::from_utf8_lossy(bytes.get(..length)?).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// What tells a device from every other, as one text.
fn identity_text(place: &Directory) -> Option<String> {
    if let Some(uuid) = attribute(place, "dm/uuid") {
        return Some(format!("dm {uuid}"));
    }
    if let Some(number) = attribute(place, "partition") {
        let disk = place.open_below(Path::new("..")).ok().and_then(|disk| identity_text(&disk))?;
        let start = attribute(place, "start")?;
        return Some(format!("{disk} partition {number} at {start}"));
    }
    if let Some(file) = attribute(place, "loop/backing_file") {
        let offset = attribute(place, "loop/offset").unwrap_or_default();
        return Some(format!("loop {file} from {offset}"));
    }
    let said: Vec<String> =
        OF_DISK.iter().filter_map(|name| attribute(place, name).map(|value| format!("{name} {value}"))).collect();
    (!said.is_empty()).then(|| said.join(" "))
}
