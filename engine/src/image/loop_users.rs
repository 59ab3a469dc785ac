//! Files that are in use through a loop device, which is mounted, or has another user. Nobody holds a lock on such a file: the
//! kernel uses it, and `mount` asks nobody.
//!
//! A confined process cannot look for them, so they are looked for before. What is mounted later is not noticed, nor what a
//! container without sysfs hides.

use super::access::Access;
use super::loop_device;
use crate::lookup::Identity;
use rustix::fs::{fstat, openat, Mode, OFlags, Stat, CWD};
use std::fs;
use std::path::Path;
use std::sync::Mutex;

/// A loop device that has a user.
#[derive(Clone, Debug, PartialEq, Eq)]
struct InUse {
    file: Identity,
    /// Its name below `/dev`.
    device: String,
    /// Whether the user may change the file.
    changes: bool,
}

/// What was found when it was looked for last.
static IN_USE: Mutex<Vec<InUse>> = Mutex::new(Vec::new());

/// Find out which files are in use through loop devices, before the process is confined.
pub fn remember_loops() {
    let found = look(Path::new("/sys/block"), Path::new("/proc/self/mountinfo"), Path::new("/proc/swaps"));
    if let Ok(mut in_use) = IN_USE.lock() {
        *in_use = found;
    }
}

/// The path of the loop device through which a file is in use in a way that this access does not bear, if there is one.
pub(super) fn used_through(file: &Stat, access: Access) -> Option<String> {
    let identity = Identity::of(file);
    let in_use = IN_USE.lock().ok()?;
    let conflict = in_use.iter().find(|used| used.file == identity && conflicts(access, used.changes))?;
    Some(format!("/dev/{}", conflict.device))
}

/// Whether an access is in conflict with a user of the file, who may change it or not.
const fn conflicts(access: Access, changes: bool) -> bool {
    match access {
        Access::ReadWrite => true,
        Access::ReadOnly => changes,
        Access::Shared => false,
    }
}

/// The loop devices below `block` that have users, as the kernel's lists of mounts and swap areas say.
fn look(block: &Path, mounts: &Path, swaps: &Path) -> Vec<InUse> {
    let names = fs::read_dir(block).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    // Only one with a file has this folder.
    let attached: Vec<String> =
        names.filter(|name| name.starts_with("loop") && block.join(name).join("loop").exists()).collect();
    if attached.is_empty() {
        return Vec::new();
    }
    let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let lists = (read(mounts), read(swaps));
    let in_use = attached.into_iter().filter_map(|name| {
        let changes = use_of(&block.join(&name), &name, &lists)?;
        Some(InUse { file: file_below(&block.join(&name), &name)?, device: name, changes })
    });
    in_use.collect()
}

/// Whether the user of a loop device may change it; `None` if it has no user.
fn use_of(folder: &Path, name: &str, (mounts, swaps): &(String, String)) -> Option<bool> {
    let says = |path: &Path, word: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == word);
    // The device and its partitions: a folder and a name each.
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let partitions = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let partitions = partitions.filter(|entry| entry.starts_with(name)).map(|entry| (folder.join(&entry), entry));
    let devices: Vec<_> = std::iter::once((folder.to_owned(), name.to_owned())).chain(partitions).collect();
    let mut used = None;
    for (folder, name) in &devices {
        let number = fs::read_to_string(folder.join("dev")).unwrap_or_default();
        for writable in mounts.lines().filter_map(|line| mounted(line, number.trim(), name)) {
            used = Some(used.unwrap_or(false) || writable);
        }
        let stacked = fs::read_dir(folder.join("holders")).is_ok_and(|mut holders| holders.next().is_some());
        let swap = format!("/dev/{name}");
        if stacked || swaps.lines().any(|line| line.split_ascii_whitespace().next() == Some(&swap)) {
            used = Some(true);
        }
    }
    // The last user of such a device detaches it, perhaps in another mount namespace.
    if used.is_none() && says(&folder.join("loop/autoclear"), "1") {
        used = Some(true);
    }
    used.map(|changes| changes && !says(&folder.join("ro"), "1"))
}

/// Whether a line of `mountinfo` (proc_pid_mountinfo(5)) is about this device, and then whether its file system is writable.
fn mounted(line: &str, number: &str, name: &str) -> Option<bool> {
    let (mount, system) = line.split_once(" - ")?;
    let mut system = system.split_ascii_whitespace().skip(1);
    let (source, options) = (system.next()?, system.next()?);
    // The number of a file system that spans several devices is none of theirs.
    let same = mount.split_ascii_whitespace().nth(2) == Some(number) || source.strip_prefix("/dev/") == Some(name);
    same.then(|| options.split(',').next() != Some("ro"))
}

/// The file below a loop device: as the device says or, for a user who may not ask it, the one that has its name.
fn file_below(folder: &Path, name: &str) -> Option<Identity> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let asked = openat(CWD, Path::new("/dev").join(name), flags, Mode::empty()).ok();
    let said = asked.and_then(|device| {
        let stat = fstat(&device).ok()?;
        loop_device::below(&device, &stat)
    });
    said.or_else(|| {
        let path = fs::read_to_string(folder.join("loop/backing_file")).ok()?;
        rustix::fs::stat(path.trim_end_matches('\n')).ok().map(|stat| Identity::of(&stat))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        for (line, found) in [
            ("42 27 7:3 / /mnt rw,relatime - ext4 /dev/loop3 rw", Some(true)),
            ("42 27 7:3 / /mnt ro,relatime shared:1 - ext4 /dev/loop3 ro,errors=continue", Some(false)),
            ("42 27 0:41 /root /mnt rw - btrfs /dev/loop3 rw,space_cache", Some(true)),
            ("42 27 7:30 / /mnt rw - ext4 /dev/loop30 rw", None),
            ("42 27 7:3 / /mnt rw", None),
            ("nonsense", None),
        ] {
            assert_eq!(mounted(line, "7:3", "loop3"), found, "{line}");
        }
    }

    #[test]
    fn users_of_all_kinds_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let names = ["loop900", "loop901", "loop902", "loop903", "loop904", "loop905"];
        for (number, name) in names.iter().enumerate() {
            write(&format!("{number}"), "");
            write(&format!("block/{name}/dev"), &format!("7:{}\n", 900 + number));
            let file = dir.path().join(number.to_string());
            write(&format!("block/{name}/loop/backing_file"), &format!("{}\n", file.display()));
            write(&format!("block/{name}/loop/autoclear"), "0\n");
            write(&format!("block/{name}/ro"), "0\n");
        }
        write("block/loop906/dev", "7:906\n");
        write("mounts", "1 2 7:900 / /a rw - ext4 /dev/loop900 ro\n2 3 259:5 / /b rw - xfs /dev/loop901p1 rw\n");
        write("block/loop901/loop901p1/dev", "259:5\n");
        write("swaps", "Filename Type\n/dev/loop902 partition 1 0 -2\n");
        write("block/loop903/holders/dm-0", "");
        write("block/loop904/loop/autoclear", "1\n");
        write("block/loop904/ro", "1\n");
        let at = |name: &str| dir.path().join(name);
        let mut found = look(&at("block"), &at("mounts"), &at("swaps"));
        found.sort_by(|a, b| a.device.cmp(&b.device));
        let expected = [(0, false), (1, true), (2, true), (3, true), (4, false)].map(|(number, changes)| InUse {
            file: Identity::of(&rustix::fs::stat(at(&number.to_string())).unwrap()),
            device: names[number].to_owned(),
            changes,
        });
        assert_eq!(found, expected);
        assert_eq!(look(&at("missing"), &at("mounts"), &at("swaps")), []);
    }
}
