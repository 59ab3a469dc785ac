//! The children of an image, in directories that hold anything: found by what their names lead to, whatever else lies there.

#![allow(clippy::unwrap_used)]

use instar::cancel::Cancel;
use instar::image::{Access, ChainImage, ChildSearch, Children, NamedFile, Roots};
use instar::lookup::Directory;
use instar::plugins::{Registry, SearchPath};
use instar_guest_abi::ErrorCode;
use instar_test_lab::lab::{Lab, LoopDevice};
use instar_test_lab::{built, PluginDir};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::Path;

const SIZE: u64 = 1 << 20;

/// Directories of images, `base` in the first one among them, and plugins.
struct Yard {
    lab: Lab,
    _plugins: PluginDir,
    registry: Registry,
}

impl Yard {
    fn new() -> Self {
        let (lab, plugins) = (Lab::new(), PluginDir::new());
        for (name, library) in [
            ("qcow2", "instar_plugin_qcow2"),
            ("raw", "instar_plugin_raw"),
            ("vhdx", "instar_plugin_vhdx"),
            ("vmdk", "instar_plugin_vmdk"),
            ("vpc", "instar_plugin_vpc"),
            ("panic", "instar_test_plugin_panicking"),
        ] {
            plugins.copy(name, &built(library));
        }
        lab.create("base", None, SIZE);
        let registry = Registry::load(&SearchPath::of(vec![plugins.path().to_owned()]));
        Self { lab, _plugins: plugins, registry }
    }

    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::create_dir_all(self.lab.path(name).parent().unwrap()).unwrap();
        fs::write(self.lab.path(name), bytes).unwrap();
    }

    /// A qcow2 image that records this backing.
    fn child(&self, name: &str, backing: &str) {
        fs::create_dir_all(self.lab.path(name).parent().unwrap()).unwrap();
        self.lab.create(name, Some(backing), SIZE);
    }

    fn link(&self, name: &str, target: &str) {
        symlink(target, self.lab.path(name)).unwrap();
    }

    fn open(&self, name: &str) -> ChainImage<'_> {
        let opened = NamedFile::new(&self.lab.path(name)).open(Access::ReadOnly, ErrorCode::ImageNotFound).unwrap();
        opened.identify_as(&self.registry, None, "-f").unwrap()
    }

    fn search(
        &self,
        directories: &[&str],
        parents: &[&str],
        known: &[&str],
        cancel: &Cancel,
    ) -> Result<Children, ErrorCode> {
        let open = |names: &[&str]| names.iter().map(|name| self.open(name)).collect::<Vec<_>>();
        let (parents, known) = (open(parents), open(known));
        let (parents, known): (Vec<_>, Vec<_>) = (parents.iter().collect(), known.iter().collect());
        let roots = Roots::none().unwrap();
        let search = ChildSearch { registry: &self.registry, roots: &roots, parents: &parents, known: &known, cancel };
        let directories: Vec<Directory> =
            directories.iter().map(|name| Directory::open(&self.lab.path(name)).unwrap()).collect();
        search.find(&directories).map_err(|error| error.code)
    }

    fn children(&self, directories: &[&str]) -> Children {
        self.search(directories, &["base"], &["base"], &Cancel::new()).unwrap()
    }

    /// The children of `base` in these directories, by their names below the first.
    fn names(&self, directories: &[&str]) -> Vec<String> {
        names(self.lab.dir.path(), &self.children(directories))
    }
}

fn names(root: &Path, found: &Children) -> Vec<String> {
    let name = |path: &Path| path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
    found.children.iter().map(|child| name(&child.path)).collect()
}

#[test]
fn a_name_counts_by_where_it_leads() {
    let yard = Yard::new();
    fs::create_dir(yard.lab.path("sub")).unwrap();
    yard.link("way", "sub");
    yard.link("link", "base");
    yard.link("sub/up", "../link");
    let absolute = yard.lab.path("base");
    let absolute = absolute.to_str().unwrap();
    let json = format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{absolute}"}}}}"#);
    let named = [
        ("a", "base"),
        ("b", "./sub/..//base"),
        ("c", absolute),
        ("d", "link"),
        ("e", "way/up"),
        ("f", &format!("file:{absolute}")),
        ("g", &json),
    ];
    for (name, backing) in named {
        yard.child(name, backing);
    }
    fs::copy(yard.lab.path("base"), yard.lab.path("copy")).unwrap();
    for (name, backing) in [
        ("0", "gone"),
        ("1", "sub/base"),
        ("2", "way"),
        ("3", "nbd://host/base"),
        ("4", "json:{}"),
        ("5", "copy"),
        ("6", "./6"),
    ] {
        yard.child(name, backing);
    }
    // The child of a child reads what is below by way of the child.
    yard.child("7", "a");
    yard.child("8", "9");
    yard.child("9", "8");
    let found = yard.children(&["."]);
    assert_eq!(names(yard.lab.dir.path(), &found), named.map(|(name, _)| name));
    let base = yard.open("base").opened.identity;
    assert!(found.children.iter().all(|child| child.parent == base && child.facts.format == "qcow2"));
    assert_eq!((found.passed_over, found.unlisted), (0, vec![]));
}

#[test]
fn what_is_known_is_no_child_whatever_its_name() {
    let yard = Yard::new();
    yard.child("top", "base");
    yard.child("other", "base");
    fs::hard_link(yard.lab.path("top"), yard.lab.path("top too")).unwrap();
    fs::hard_link(yard.lab.path("other"), yard.lab.path("other too")).unwrap();
    fs::copy(yard.lab.path("top"), yard.lab.path("top.bak")).unwrap();
    let found = yard.search(&["."], &["base"], &["base", "top"], &Cancel::new()).unwrap();
    assert_eq!(found.children.len(), 2, "{found:?}");
    let names = names(yard.lab.dir.path(), &found);
    assert!(names[0].starts_with("other") && names[1] == "top.bak", "{names:?}");
}

#[test]
fn names_begin_at_the_directory_of_the_child() {
    let yard = Yard::new();
    yard.child("near/child", "../base");
    yard.child("near/stranger", "base");
    yard.child("near/far/child", "../../base");
    yard.child("allowed/child", yard.lab.path("base").to_str().unwrap());
    // A link is found where it leads to, if that is looked at; a second name of a file is one.
    yard.link("allowed/link", "../near/child");
    fs::create_dir(yard.lab.path("same")).unwrap();
    fs::hard_link(yard.lab.path("near/child"), yard.lab.path("same/child")).unwrap();
    // Below this directory, the same file has another parent.
    fs::create_dir_all(yard.lab.path("else/where")).unwrap();
    fs::hard_link(yard.lab.path("near/child"), yard.lab.path("else/where/child")).unwrap();
    assert_eq!(yard.names(&["."]), [""; 0]);
    assert_eq!(yard.names(&["near"]), ["near/child"]);
    assert_eq!(yard.names(&["allowed"]), ["allowed/child"]);
    assert_eq!(yard.names(&["else/where"]), [""; 0]);
    assert_eq!(
        yard.names(&["else/where", "near", "near/far", "same", "allowed", "near"]),
        ["allowed/child", "near/child", "near/far/child"]
    );
}

#[test]
fn every_parent_has_its_own() {
    let yard = Yard::new();
    yard.child("middle", "base");
    yard.child("top", "middle");
    yard.child("of middle", "middle");
    yard.child("of base", "base");
    let found = yard.search(&["."], &["middle", "base"], &["top", "middle", "base"], &Cancel::new()).unwrap();
    assert_eq!(names(yard.lab.dir.path(), &found), ["of base", "of middle"]);
    let parents: Vec<_> = found.children.iter().map(|child| child.parent).collect();
    assert_eq!(parents, ["base", "middle"].map(|name| yard.open(name).opened.identity));
    // Of an image that is to be opened again, it has to be the same file.
    assert!(found.children[0].open(Access::ReadWrite).is_ok());
    fs::copy(yard.lab.path("of base"), yard.lab.path("new")).unwrap();
    fs::rename(yard.lab.path("new"), yard.lab.path("of base")).unwrap();
    assert!(found.children[0].open(Access::ReadOnly).unwrap_err().message.contains("replaced"));
    fs::remove_file(yard.lab.path("of base")).unwrap();
    assert_eq!(found.children[0].open(Access::ReadOnly).unwrap_err().code, ErrorCode::ImageNotFound);
}

#[test]
fn an_identity_stands_for_a_name_that_leads_nowhere() {
    let yard = Yard::new();
    for word in ["parent  ", "stranger", "child   ", "nameless", "unproven", "unsaid  "] {
        yard.put(word.trim_end(), format!("PANIC {word}"));
    }
    for (parent, children) in [("parent", &["child", "nameless"][..]), ("stranger", &[])] {
        let found = yard.search(&["."], &[parent], &[parent], &Cancel::new()).unwrap();
        assert_eq!(names(yard.lab.dir.path(), &found), children, "{parent}");
    }
    yard.lab.qemu_img(&["create", "-q", "-f", "raw", "gone", "1M"]);
    // A name that leads somewhere counts for a format that proves nothing, too.
    yard.put("gone", "PANIC parent  ");
    let found = yard.search(&["."], &["gone"], &["gone"], &Cancel::new()).unwrap();
    assert_eq!(names(yard.lab.dir.path(), &found), ["child", "nameless", "unproven"]);
}

#[test]
fn descriptors_and_raw_parents() {
    let yard = Yard::new();
    yard.lab.qemu_img(&["create", "-q", "-f", "vmdk", "base.vmdk", "1M"]);
    yard.lab.qemu_img(&["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "one.vmdk"]);
    let split = "subformat=twoGbMaxExtentSparse";
    yard.lab.qemu_img(&["create", "-q", "-f", "vmdk", "-o", split, "-b", "base.vmdk", "-F", "vmdk", "split.vmdk"]);
    let found = yard.search(&["."], &["base.vmdk"], &["base.vmdk"], &Cancel::new()).unwrap();
    assert_eq!(names(yard.lab.dir.path(), &found), ["one.vmdk", "split.vmdk"]);
    let search = |parent: &str| {
        let opened = NamedFile::new(&yard.lab.path(parent)).open(Access::ReadOnly, ErrorCode::ImageNotFound).unwrap();
        let parent = opened.identify_as(&yard.registry, Some("raw"), "-f").unwrap();
        let (roots, cancel) = (Roots::none().unwrap(), Cancel::new());
        let search = ChildSearch {
            registry: &yard.registry,
            roots: &roots,
            parents: &[&parent],
            known: &[&parent],
            cancel: &cancel,
        };
        let found = search.find(&[Directory::open(yard.lab.dir.path()).unwrap()]).unwrap();
        names(yard.lab.dir.path(), &found)
    };
    yard.put("disk.raw", vec![0; 4096]);
    yard.child("of raw", "disk.raw");
    assert_eq!(search("disk.raw"), ["of raw"]);
    let Some(device) = LoopDevice::new(&yard.lab.path("disk.raw")) else { return };
    yard.child("of device", &device.0);
    assert_eq!(search(&device.0), ["of device", "of raw"], "a loop device is what it stands on");
    // The file below the device, whatever it holds, is not looked at.
    fs::copy(yard.lab.path("of raw"), yard.lab.path("disk.raw")).unwrap();
    assert_eq!(search(&device.0), ["of device", "of raw"]);
}

#[test]
fn what_is_no_sound_image_stops_nothing() {
    let yard = Yard::new();
    yard.child("z", "base");
    let good = fs::read(yard.lab.path("z")).unwrap();
    for (number, word) in ["infacts ", "lieforma", "liesize ", "readall ", "inprobe ", "toosure "].iter().enumerate() {
        yard.put(&format!("faulty {number}"), format!("PANIC {word}"));
    }
    let mut cut = 0;
    for length in (0..200).chain((200..good.len().min(4096)).step_by(97)) {
        // A cut header may be one of an older version, or none.
        yard.put(&format!("cut {length}"), &good[..length]);
        cut += 1;
    }
    for at in 8..112 {
        let mut wild = good.clone();
        wild[at] = 0xff;
        yard.put(&format!("wild {at}"), &wild);
    }
    yard.put("empty", "");
    yard.put("text", "base");
    yard.put("zeroes", vec![0; 1 << 20]);
    let found = yard.children(&["."]);
    let names = names(yard.lab.dir.path(), &found);
    assert!(names.contains(&"z".to_owned()));
    assert!(names.iter().all(|name| !name.starts_with("faulty")), "{names:?}");
    assert!(found.passed_over > 6 && found.passed_over < cut + 104 + 6, "{}", found.passed_over);
}

#[test]
fn only_files_are_opened() {
    let yard = Yard::new();
    yard.child("child", "base");
    let path = |name: &str| yard.lab.path(name);
    rustix::fs::mkfifoat(rustix::fs::CWD, path("fifo"), rustix::fs::Mode::from_raw_mode(0o666)).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    symlink("/dev/tty", path("terminal")).unwrap();
    symlink("loop", path("loop")).unwrap();
    symlink("gone", path("dangling")).unwrap();
    fs::write(path("").join(OsStr::from_bytes(b"\xff\xfe\n")), "x").unwrap();
    fs::copy(path("child"), path("").join(OsStr::from_bytes(b"a\n\xff"))).unwrap();
    let found = yard.children(&["."]);
    assert_eq!(found.children.len(), 2, "{found:?}");
    assert_eq!(found.passed_over, 0);
}

/// The names in a directory change while it is read.
#[test]
fn files_that_vanish_are_no_children() {
    let yard = Yard::new();
    yard.child("child", "base");
    let (stop, path) = (Cancel::new(), yard.lab.path("fleeting"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.is_cancelled() {
                fs::write(&path, "QFI\u{fb}").unwrap();
                fs::remove_file(&path).unwrap();
                fs::create_dir(&path).unwrap();
                fs::remove_dir(&path).unwrap();
                symlink("base", &path).unwrap();
                fs::remove_file(&path).unwrap();
            }
        });
        for _ in 0..500 {
            assert_eq!(yard.names(&["."]), ["child"]);
        }
        stop.cancel();
    });
}

#[test]
fn a_name_is_not_followed_for_ever() {
    let yard = Yard::new();
    fs::create_dir(yard.lab.path("d")).unwrap();
    yard.child("honest", &format!("{}base", "d/../".repeat(40)));
    yard.link("way", &format!("{}base", "./".repeat(600)));
    yard.child("endless", "way");
    for number in 0..40 {
        yard.link(&format!("l{number}"), &format!("l{}", number + 1));
    }
    yard.link("l40", "base");
    yard.child("forty", "l1");
    yard.child("more", "l0");
    assert_eq!(yard.names(&["."]), ["forty", "honest"]);
}

#[test]
fn what_may_not_be_read_is_said() {
    let yard = Yard::new();
    if rustix::process::geteuid().is_root() {
        // Whom nothing is denied: `tests/integration/test_siblings.py` becomes another user.
        return;
    }
    yard.child("closed", "base");
    yard.child("sub/child", "../base");
    let permit = |name: &str, mode| fs::set_permissions(yard.lab.path(name), fs::Permissions::from_mode(mode)).unwrap();
    permit("closed", 0);
    permit("sub", 0o111);
    let found = yard.children(&[".", "sub"]);
    permit("sub", 0o755);
    assert_eq!((found.passed_over, found.unlisted), (1, vec![yard.lab.path("sub")]));
}

#[test]
fn it_ends_when_it_is_to() {
    let (yard, cancel) = (Yard::new(), Cancel::new());
    cancel.cancel();
    assert_eq!(yard.search(&["."], &["base"], &[], &cancel).unwrap_err(), ErrorCode::Interrupted);
}
