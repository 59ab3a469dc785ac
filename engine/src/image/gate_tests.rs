//! Where names may lead: on real directories, since that is what decides.

#![allow(clippy::unwrap_used)]

use super::access::Access;
use super::advice::{RecordedRole, Recorder};
use super::gate::{Gate, Located};
use super::named::NamedFile;
use super::open::OpenedFile;
use super::roots::Roots;
use crate::error::Error;
use crate::lookup::Directory;
use crate::plugins::ImageRead;
use instar_guest_abi::ErrorCode;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A directory `vm` with an image `top`, and things around it. Each file holds its own path below the directory.
struct Yard {
    dir: TempDir,
    root: PathBuf,
}

impl Yard {
    fn new(files: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let yard = Self { dir, root };
        for file in ["vm/top"].iter().chain(files) {
            yard.file(file);
        }
        yard
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn file(&self, name: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), name).unwrap();
    }

    fn link(&self, name: &str, target: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        symlink(target, self.path(name)).unwrap();
    }

    fn roots(&self, allowed: &[&str]) -> Roots {
        let allowed: Vec<PathBuf> = allowed.iter().map(|name| self.path(name)).collect();
        Roots::of(&NamedFile::new(&self.path("vm/top")), &allowed).unwrap()
    }

    fn find_as(&self, name: &[u8], allowed: &[&str], role: RecordedRole, access: Access) -> Result<Located, Error> {
        let directory = Directory::open(&self.path("vm")).unwrap();
        let path = self.path("vm/top");
        let recorder = Recorder { path: &path, format: "qcow2", directory: &directory, role };
        Gate::within(self.roots(allowed)).find(&recorder, [name], access, None)
    }

    fn find(&self, name: &str, allowed: &[&str]) -> Result<Located, Error> {
        self.find_as(name.as_bytes(), allowed, RecordedRole::Target, Access::ReadWrite)
    }

    /// What is read by that name, or why not.
    fn reads(&self, name: &str, allowed: &[&str]) -> Result<String, Error> {
        self.content(&self.find(name, allowed)?)
    }

    fn content(&self, located: &Located) -> Result<String, Error> {
        let directory = Directory::open(&self.path("vm")).unwrap();
        let path = self.path("vm/top");
        let recorder = Recorder { path: &path, format: "qcow2", directory: &directory, role: RecordedRole::Target };
        let opened = OpenedFile::located(located, &recorder, Access::ReadWrite)?;
        Ok(text(&opened))
    }

    fn refused(&self, name: &str, allowed: &[&str]) -> String {
        let error = self.reads(name, allowed).unwrap_err();
        assert_eq!(error.code, ErrorCode::WriteTargetNotAllowed, "{name}: {}", error.message);
        error.message
    }
}

#[test]
fn names_are_walked_as_the_kernel_walks_them() {
    let yard = Yard::new(&["vm/base", "vm/sub/base", "releases/base", "releases/42/x"]);
    yard.link("vm/current", "../releases/42");
    yard.link("vm/link", "sub/base");
    yard.link("vm/way", "./sub//.");
    yard.link("vm/absolute", yard.path("vm/sub").to_str().unwrap());
    for (name, wanted) in [
        ("base", "vm/base"),
        ("./base", "vm/base"),
        ("sub/../base", "vm/base"),
        ("sub//base", "vm/sub/base"),
        ("../vm/base", "vm/base"),
        ("../releases/../vm/base", "vm/base"),
        ("link", "vm/sub/base"),
        ("way/base", "vm/sub/base"),
        ("way/../base", "vm/base"),
        ("absolute/base", "vm/sub/base"),
        ("absolute/../base", "vm/base"),
        (yard.path("vm/base").to_str().unwrap(), "vm/base"),
        (yard.path("vm/way/base").to_str().unwrap(), "vm/sub/base"),
        (yard.path("releases/42/../../vm/base").to_str().unwrap(), "vm/base"),
    ] {
        assert_eq!(yard.reads(name, &[]).unwrap(), wanted, "{name}");
        assert_eq!(fs::read_to_string(yard.path("vm").join(name)).unwrap(), wanted, "{name}");
    }
    yard.refused("current/../base", &[]);
    assert_eq!(yard.reads("current/../base", &["releases"]).unwrap(), "releases/base");
}

#[test]
fn names_that_are_not_followed() {
    let yard = Yard::new(&["vm/base", "base", "vmx/base", "vm/sub/x"]);
    yard.link("vm/out", "../base");
    yard.link("vm/dir", "..");
    for name in ["../base", "sub/../../base", "/etc/passwd", "out", "dir/base", "../vmx/base", "dir/vmx/base"] {
        let message = yard.refused(name, &[]);
        assert!(message.contains("leads outside") && message.contains("-b "), "{message}");
    }
    for name in ["", "nbd://x", "C:\\x", "json:{}", "sub/", "..", "a\0b"] {
        let message = yard.refused(name, &[]);
        assert!(message.contains("rebase -u") && !message.contains(" -b '"), "{message}");
    }
    assert_eq!(yard.find("sub", &[]).unwrap_err().code, ErrorCode::OpenFailed);
    assert_eq!(yard.find("base/x", &[]).unwrap_err().code, ErrorCode::OpenFailed);
    assert_eq!(yard.find("absent", &[]).unwrap_err().code, ErrorCode::BackingNotFound);
    assert_eq!(yard.find("absent/base", &[]).unwrap_err().code, ErrorCode::BackingNotFound);
}

#[test]
fn what_is_allowed_is_compared_by_what_it_is() {
    let yard = Yard::new(&["store/base", "store/deep/er/base", "elsewhere/base"]);
    yard.link("vm/base", "../store/base");
    yard.link("vm/dir", "../store");
    yard.link("allowed", "store");
    yard.link("store/link", "../elsewhere/base");
    for allowed in ["store", "allowed", "vm/../store/deep/.."] {
        for (name, wanted) in [
            ("base", "store/base"),
            ("dir/base", "store/base"),
            ("../store/deep/er/base", "store/deep/er/base"),
            ("../allowed/base", "store/base"),
            (yard.path("allowed/base").to_str().unwrap(), "store/base"),
        ] {
            assert_eq!(yard.reads(name, &[allowed]).unwrap(), wanted, "{name} {allowed}");
        }
        yard.refused("dir/link", &[allowed]);
    }
    assert_eq!(yard.reads("dir/link", &["store", "elsewhere"]).unwrap(), "elsewhere/base");
}

#[test]
fn outside_nothing_is_told() {
    let yard = Yard::new(&["outside/there", "outside/deep/there", "vm/sub/x"]);
    yard.link("vm/a", "../outside/there");
    yard.link("vm/b", "../outside/gone0");
    yard.link("outside/link", "/etc/passwd");
    for (there, gone) in [
        ("../outside/there", "../outside/gone0"),
        ("../outside/link", "../outside/gone"),
        ("../outside/deep/there", "../outside/gone/there"),
        ("../outside", "../gone"),
        ("sub/../../outside/there/x", "sub/../../outside/gone0/x"),
        ("/etc/passwd", "/gon/passwd"),
        ("/root/../etc/passwd", "/gone/../etc/passwd"),
    ] {
        let told = |name: &str| {
            let message = yard.refused(name, &[]);
            ["outside", "passwd", "there", "link", "gone0", "gone", "gon", "deep", "etc", "root", "000"]
                .iter()
                .fold(message, |text, word| text.replace(word, "*"))
                .replace("**", "*")
        };
        assert_eq!(told(there), told(gone), "{there} {gone}");
    }
    assert_eq!(
        yard.refused("a", &[]).replace("there", "").replace("'a'", ""),
        yard.refused("b", &[]).replace("gone0", "").replace("'b'", "")
    );
}

/// What a refusal names is allowed, and the file is found. Where links lead on outside, that takes a step each.
#[test]
fn what_a_refusal_advises_helps() {
    let yard = Yard::new(&["store/base", "far/base", "vm/sub/x"]);
    yard.link("vm/link", "../store/base");
    yard.link("vm/dir", "sub/../../store");
    yard.link("vm/chain", "../store/on");
    yard.link("store/on", "../far/base");
    for name in ["../store/base", "link", "dir/base", "chain", yard.path("store/base").to_str().unwrap()] {
        let mut allowed: Vec<String> = Vec::new();
        let found = loop {
            let list: Vec<&str> = allowed.iter().map(String::as_str).collect();
            match yard.reads(name, &list) {
                Ok(found) => break found,
                Err(error) => {
                    let (_, after) = error.message.split_once("--allow-backing-dir '").unwrap();
                    let directory = after.split('\'').next().unwrap().to_owned();
                    assert!(!allowed.contains(&directory) && allowed.len() < 3, "{}", error.message);
                    let (_, base) = error.message.split_once("-b '").unwrap();
                    let base = base.split('\'').next().unwrap();
                    let real = yard.path("vm").join(name).canonicalize().unwrap();
                    assert_eq!(Path::new(base).canonicalize().unwrap(), real, "{}", error.message);
                    allowed.push(directory);
                }
            }
        };
        assert!(found.ends_with("/base"), "{name}");
        assert!(allowed.len() == if name == "chain" { 2 } else { 1 }, "{name}: {allowed:?}");
    }
}

#[test]
fn what_an_image_may_not_choose() {
    let yard = Yard::new(&["vm/.bashrc", "vm/.ssh/id", "vm/script", "vm/x/base", ".store/base", ".store/.hid/base"]);
    fs::set_permissions(yard.path("vm/script"), Permissions::from_mode(0o644 | 0o010)).unwrap();
    yard.link("vm/link", ".bashrc");
    yard.link("vm/dir", ".ssh");
    for name in [".bashrc", ".ssh/id", "link", "dir/id", "x/../.ssh/id", yard.path("vm/.ssh/id").to_str().unwrap()] {
        let message = yard.refused(name, &[]);
        assert!(message.contains("hidden") && message.contains("-b '"), "{message}");
        let read = yard.find_as(name.as_bytes(), &[], RecordedRole::Ancestor, Access::ReadOnly).unwrap_err().message;
        assert!(read.contains("hidden") && !read.contains("-b '"), "{read}");
    }
    // Only below what the operator allowed: how that is called is not the image's choice.
    assert_eq!(yard.reads("../.store/base", &[".store"]).unwrap(), ".store/base");
    yard.refused("../.store/.hid/base", &[".store"]);
    assert_eq!(yard.reads("../.store/.hid/base", &[".store", ".store/.hid"]).unwrap(), ".store/.hid/base");
    assert_eq!(yard.reads(".ssh/id", &["vm/.ssh"]).unwrap(), "vm/.ssh/id");
    let message = yard.refused("script", &[]);
    assert!(message.contains("executable") && message.contains("-b '"), "{message}");
    assert!(yard.find_as(b"script", &[], RecordedRole::Ancestor, Access::ReadOnly).is_ok());
}

#[test]
fn what_the_operator_names_is_let_through() {
    let yard = Yard::new(&["far/.hidden", "vm/base"]);
    fs::set_permissions(yard.path("far/.hidden"), Permissions::from_mode(0o755)).unwrap();
    let base = NamedFile::new(&yard.path("far/.hidden"));
    let directory = Directory::open(&yard.path("vm")).unwrap();
    let path = yard.path("vm/top");
    let recorder = Recorder { path: &path, format: "qcow2", directory: &directory, role: RecordedRole::Ancestor };
    let gate = Gate::within(yard.roots(&[]));
    let find = |name: &[u8]| gate.find(&recorder, [name], Access::ReadOnly, base.identity());
    assert!(find(b"../far/.hidden").unwrap().is_named_by_operator());
    assert!(!find(b"base").unwrap().is_named_by_operator());
    yard.link("vm/way", "../far/.hidden");
    let located = find(b"way").unwrap();
    assert!(located.is_named_by_operator());
    // The names in it begin where the chain has it.
    assert_eq!(located.beside().identity(), directory.identity());
}

#[test]
fn links_without_an_end() {
    let yard = Yard::new(&["vm/end"]);
    yard.link("vm/loop", "loop");
    yard.link("vm/ping", "./pong");
    yard.link("vm/pong", "ping");
    yard.link("vm/0", "end");
    for number in 1..=40 {
        yard.link(&format!("vm/{number}"), &(number - 1).to_string());
    }
    for name in ["loop", "ping", "loop/x", "40"] {
        let error = yard.find(name, &[]).unwrap_err();
        assert!(error.code == ErrorCode::OpenFailed && error.message.contains("40"), "{}", error.message);
        assert_eq!(fs::read(yard.path("vm").join(name)).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }
    // As many as the kernel follows.
    assert_eq!(yard.reads("39", &[]).unwrap(), "vm/end");
    assert!(fs::read(yard.path("vm/39")).is_ok());
}

/// Directories below one another, and links that lead through all of them again and again: what that takes is bounded.
#[test]
fn deep_directories_take_no_time() {
    let yard = Yard::new(&["outside/base"]);
    let deep = "d/".repeat(1500);
    let mut at = Directory::open(&yard.path("vm")).unwrap();
    for _ in 0..1500 {
        rustix::fs::mkdirat(&at, "d", rustix::fs::Mode::RWXU).unwrap();
        at = at.enter(OsStr::new("d")).unwrap();
    }
    rustix::fs::symlinkat(yard.path("outside/base"), &at, "out").unwrap();
    yard.refused(&format!("{deep}out"), &[]);
    assert_eq!(yard.reads(&format!("{deep}out"), &["outside"]).unwrap(), "outside/base");
    for number in 0..30 {
        let name = if number == 0 { "vm/l0".to_owned() } else { format!("vm/l{number}") };
        let next = if number == 0 { "top".to_owned() } else { format!("l{}", number - 1) };
        yard.link(&name, &format!("{}{}{next}", "d/".repeat(500), "../".repeat(500)));
    }
    // The kernel follows it.
    let error = yard.find("l29", &[]).unwrap_err();
    assert!(error.message.contains("too long"), "{}", error.message);
    assert_eq!(yard.reads("l5", &[]).unwrap(), "vm/top");
}

#[test]
fn links_of_procfs_are_not_read() {
    let yard = Yard::new(&["vm/base"]);
    let file = fs::File::open(yard.path("vm/base")).unwrap();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&file);
    yard.link("vm/magic", &format!("/proc/self/fd/{descriptor}"));
    yard.link("vm/root", "/proc/self/root");
    let absolute = format!("/proc/self/fd/{descriptor}");
    let base = yard.path("vm/base");
    for name in ["magic", absolute.as_str(), &format!("root{}", base.display()), "/dev/fd/0"] {
        yard.refused(name, &[]);
    }
}

#[test]
fn names_that_are_odd() {
    let yard = Yard::new(&[]);
    let odd = OsStr::from_bytes(b"\xff\xfe\x1b[2J\n");
    fs::create_dir(yard.path("vm").join(odd)).unwrap();
    fs::write(yard.path("vm").join(odd).join(odd), "odd").unwrap();
    let name = [odd.as_bytes(), b"/", odd.as_bytes()].concat();
    let located = yard.find_as(&name, &[], RecordedRole::Target, Access::ReadWrite).unwrap();
    assert_eq!(yard.content(&located).unwrap(), "odd");
    // As long as a path may be, and longer than a name may be.
    yard.file("vm/a/base");
    let long = format!("a/{}base", "./".repeat(2045));
    assert_eq!((long.len(), yard.reads(&long, &[]).unwrap().as_str()), (4096, "vm/a/base"));
    let deep = "a/../".repeat(800) + "a/base";
    assert_eq!(yard.reads(&deep, &[]).unwrap(), "vm/a/base");
    assert_eq!(yard.find(&"x".repeat(300), &[]).unwrap_err().code, ErrorCode::OpenFailed);
    assert_eq!(yard.refused(&"x".repeat(4097), &[]).matches("no file name").count(), 1);
}

#[test]
fn what_is_looked_at_is_what_is_opened() {
    let yard = Yard::new(&["vm/base", "other/base"]);
    for swap in ["file", "link", "fifo", "gone"] {
        yard.file("vm/base");
        let located = yard.find("base", &[]).unwrap();
        fs::remove_file(yard.path("vm/base")).unwrap();
        match swap {
            "file" => fs::write(yard.path("vm/base"), "another").unwrap(),
            "link" => yard.link("vm/base", "../other/base"),
            "fifo" => {
                let fifo = std::ffi::CString::new(yard.path("vm/base").as_os_str().as_bytes()).unwrap();
                // SAFETY: a path that ends in a zero byte.
                assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
            }
            _ => {}
        }
        let error = yard.content(&located).unwrap_err();
        let wanted = if swap == "gone" { "does not exist" } else { "was replaced" };
        assert!(error.message.contains(wanted), "{swap}: {}", error.message);
        let _ = fs::remove_file(yard.path("vm/base"));
    }
    assert_eq!(fs::read_to_string(yard.path("other/base")).unwrap(), "other/base");
}

#[test]
fn a_directory_that_is_exchanged_stays_what_it_was() {
    let yard = Yard::new(&["vm/base", "other/base", "other/top"]);
    let directory = Directory::open(&yard.path("vm")).unwrap();
    let gate = Gate::within(yard.roots(&[]));
    let path = yard.path("vm/top");
    let recorder = Recorder { path: &path, format: "qcow2", directory: &directory, role: RecordedRole::Target };
    fs::rename(yard.path("vm"), yard.path("moved")).unwrap();
    yard.link("vm", "other");
    let located = gate.find(&recorder, [b"base".as_slice()], Access::ReadWrite, None).unwrap();
    assert_eq!(yard_content(&located, &recorder), "vm/base");
    // By its name, it is another directory now.
    assert!(gate.find(&recorder, [yard.path("vm/base").as_os_str().as_bytes()], Access::ReadWrite, None).is_err());
    // Also when it has no name any more.
    fs::remove_dir_all(yard.path("moved")).unwrap();
    let error = gate.find(&recorder, [b"base".as_slice()], Access::ReadWrite, None).unwrap_err();
    assert_eq!(error.code, ErrorCode::BackingNotFound, "{}", error.message);
    assert!(yard.dir.path().exists());
}

fn yard_content(located: &Located, recorder: &Recorder<'_>) -> String {
    text(&OpenedFile::located(located, recorder, Access::ReadWrite).unwrap())
}

fn text(opened: &OpenedFile) -> String {
    let mut bytes = vec![0; 256];
    let length = opened.file.read_at(0, &mut bytes).unwrap();
    String::from_utf8(bytes[..length].to_vec()).unwrap()
}
