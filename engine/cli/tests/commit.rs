//! `instar commit`, the program, on real images: what it does, what it refuses, and that a refusal changes nothing.

#![allow(clippy::unwrap_used, clippy::panic)]

use instar::image::{Access, OpenedFile};
use instar::sandbox::Sandbox;
use instar_guest_abi::ErrorCode;
use instar_test_lab::lab::{Lab, LoopDevice, MIB};
use serde_json::Value;
use std::fs::read;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

#[test]
fn commits_into_the_recorded_backing() {
    let lab = Lab::pair();
    let outcome = lab.committed(&["top"], "top", "base");
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("Image committed.\n", ""));
    assert_eq!(lab.qemu_img(&["map", "--output=json", "--max-length=1", "top"]).matches("\"depth\": 0").count(), 0);
}

#[test]
fn reports_json() {
    let lab = Lab::pair();
    let outcome = lab.committed(&["--output", "json", "-f", "qcow2", "./top"], "top", "base");
    assert!(outcome.stderr.is_empty() && outcome.stdout.ends_with("}\n"));
    let value: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = [
        "overlay",
        "overlay_format",
        "backing",
        "backing_format",
        "clusters_committed",
        "bytes_committed",
        "overlay_clusters_cleared",
        "sandbox",
    ];
    assert_eq!(keys, expected);
    let root = lab.dir.path().canonicalize().unwrap();
    assert_eq!(value["overlay"], root.join("top").to_str().unwrap());
    assert_eq!(value["backing"], root.join("base").to_str().unwrap());
    assert_eq!(value["sandbox"], instar_test_lab::sandbox().name());
    // 16 of data, 2 of a partial write, 8 zero clusters.
    assert_eq!(value["clusters_committed"], 26);
    assert_eq!(value["bytes_committed"], 26 * 65536);
    assert_eq!(value["overlay_clusters_cleared"], 26);
    assert!(outcome.stdout.contains("\n  \"overlay\""));
}

#[test]
fn an_empty_overlay_commits_nothing() {
    let lab = Lab::new();
    lab.create("base", None, MIB);
    lab.create("top", Some("base"), MIB);
    let outcome = lab.committed(&["--output=json", "top"], "top", "base");
    assert!(outcome.stdout.contains("\"clusters_committed\": 0"));
    assert!(lab.instar(&["-q", "top"]).stdout.is_empty());
}

#[test]
fn the_immediate_parent_may_be_named() {
    for base in ["base", "./base", "../{dir}/base", "{abs}/base", "link"] {
        let lab = Lab::pair();
        symlink("base", lab.path("link")).unwrap();
        let abs = lab.dir.path().to_str().unwrap();
        let dir = lab.dir.path().file_name().unwrap().to_str().unwrap();
        let base = base.replace("{dir}", dir).replace("{abs}", abs);
        let outcome = lab.committed(&["-b", &base, "top"], "top", "base");
        assert_eq!(outcome.stdout, "Image committed.\n");
        assert_eq!(lab.qemu_img(&["map", "--output=json", "top"]).matches("\"depth\": 0").count(), 0, "emptied");
    }
}

#[test]
fn names_begin_at_the_overlay_and_not_at_the_working_directory() {
    let lab = Lab::pair();
    std::fs::create_dir(lab.path("sub")).unwrap();
    for name in ["top", "base"] {
        std::fs::rename(lab.path(name), lab.path("sub").join(name)).unwrap();
    }
    lab.refused(
        &["-b", "sub/base", "sub/top"],
        ErrorCode::BackingNotFound,
        &["does not exist", "immediate parent is base"],
    );
    lab.committed(&["-b", "base", "sub/top"], "sub/top", "sub/base");
}

#[test]
fn what_does_not_exist() {
    let lab = Lab::pair();
    lab.create("orphan", Some("missing"), MIB);
    lab.refused(&["nothing"], ErrorCode::ImageNotFound, &["'nothing'", "does not exist"]);
    lab.refused(&["nothing/top"], ErrorCode::ImageNotFound, &["does not exist"]);
    lab.refused(&["orphan"], ErrorCode::BackingNotFound, &["/missing'", "does not exist"]);
    lab.refused(&["base"], ErrorCode::NoBacking, &["'base'", "no recorded backing file"]);
    lab.refused(&["-b", "top", "base"], ErrorCode::NoBacking, &["no recorded backing file"]);
    lab.refused(&["-b", "missing", "top"], ErrorCode::BackingNotFound, &["does not exist", "immediate parent is base"]);
    assert_eq!(lab.instar(&["-b", "", "top"]).status, 2);
}

#[test]
fn a_base_elsewhere_is_refused() {
    let lab = Lab::pair();
    lab.create("other", None, 64 * MIB);
    lab.create("higher", Some("top"), 64 * MIB);
    let parent = "the overlay's immediate parent is base";
    lab.refused(&["-b", "other", "top"], ErrorCode::NotInChain, &[parent]);
    lab.refused(&["-b", "top", "top"], ErrorCode::NotInChain, &[parent]);
    lab.refused(&["-b", "nbd:x:1", "top"], ErrorCode::BackingNotFound, &[parent, "nbd"]);
    let parent = "the overlay's immediate parent is top";
    lab.refused(&["-b", "other", "higher"], ErrorCode::NotInChain, &[parent]);
}

#[test]
fn recorded_names_that_lead_elsewhere_are_refused() {
    let lab = Lab::new();
    let outside = TempDir::new().unwrap();
    let victim = outside.path().join("victim");
    lab.create(victim.to_str().unwrap(), None, MIB);
    let before = read(&victim).unwrap();
    symlink(&victim, lab.path("link")).unwrap();
    symlink(outside.path(), lab.path("dirlink")).unwrap();
    let up = format!("../{}/victim", outside.path().file_name().unwrap().to_str().unwrap());
    let absolute = victim.to_str().unwrap();
    let file = format!("file:{absolute}");
    std::fs::create_dir(lab.path("\u{1b}[2J")).unwrap();
    for name in [
        "nbd:localhost:1",
        "json:{}",
        &file,
        "a:b",
        "/etc/passwd",
        "\u{1b}[2J/../../x",
        &up,
        absolute,
        "link",
        "dirlink/victim",
    ] {
        lab.create("plain", None, MIB);
        // `qemu-img create` looks at some of them even with -u; a rebase does not.
        lab.qemu_img(&["rebase", "-u", "-F", "qcow2", "-b", name, "plain"]);
        lab.refused(&["plain"], ErrorCode::WriteTargetNotAllowed, &["-b"]);
    }
    assert!(read(&victim).unwrap() == before);
    // What the operator names, or allows, is another matter.
    lab.create("top", Some(absolute), MIB);
    lab.io("top", &["write -P 9 0 64k"]);
    let allowed = outside.path().to_str().unwrap();
    std::fs::remove_file(lab.path("plain")).unwrap();
    lab.committed(&["--allow-backing-dir", allowed, "top"], "top", absolute);
    lab.io("top", &["write -P 8 64k 64k"]);
    lab.committed(&["-b", absolute, "top"], "top", absolute);
}

#[test]
fn loops_and_depth() {
    let lab = Lab::new();
    lab.create("self", None, MIB);
    lab.qemu_img(&["rebase", "-u", "-F", "qcow2", "-b", "self", "self"]);
    lab.create("a", Some("b"), MIB);
    std::fs::hard_link(lab.path("a"), lab.path("b")).unwrap();
    lab.create("x", Some("y"), MIB);
    lab.create("y", Some("z"), MIB);
    lab.create("z", Some("x"), MIB);
    for image in ["self", "a", "x"] {
        lab.refused(&[image], ErrorCode::ChainLoop, &["'"]);
    }
    lab.refused(&["-b", "self", "self"], ErrorCode::ChainLoop, &["self'"]);
}

#[test]
fn formats_are_verified() {
    let lab = Lab::pair();
    lab.refused(&["-f", "raw", "top"], ErrorCode::FormatMismatch, &["'top'", "raw", "qcow2"]);
    lab.refused(&["-f", "bogus", "top"], ErrorCode::PluginUnavailable, &["bogus"]);
    lab.qemu_img(&["rebase", "-u", "-F", "raw", "-b", "base", "top"]);
    lab.refused(&["top"], ErrorCode::FormatMismatch, &["/base'", "raw", "qcow2"]);
    lab.refused(&["-b", "base", "top"], ErrorCode::FormatMismatch, &["raw"]);
    lab.qemu_img(&["rebase", "-u", "-F", "qed", "-b", "base", "top"]);
    lab.refused(&["top"], ErrorCode::PluginUnavailable, &["/base'", "qed"]);
    lab.qemu_img(&["rebase", "-u", "-F", "qcow2", "-b", "flat", "top"]);
    std::fs::write(lab.path("flat"), vec![7; 1 << 20]).unwrap();
    lab.refused(&["top"], ErrorCode::FormatMismatch, &["/flat'", "qcow2"]);
    lab.refused(&["flat"], ErrorCode::UnsupportedFormat, &["'flat'", "begins like no known format"]);
}

#[test]
fn a_larger_overlay_needs_a_word() {
    let lab = Lab::new();
    lab.create("base", None, MIB);
    lab.create("top", Some("base"), 2 * MIB);
    let words = ["exceeds backing virtual size", "give --resize-backing"];
    lab.refused(&["top"], ErrorCode::OverlayLargerThanBacking, &words);
    let dry = lab.instar(&["--resize-backing", "--dry-run", "-v", "top"]);
    assert_eq!(dry.status, 0, "{}", dry.stderr);
    assert!(dry.stdout.contains("would grow to 2097152 bytes (2 MiB)"), "{}", dry.stdout);
    assert!(dry.stderr.contains("grows to 2097152 bytes"), "{}", dry.stderr);
    assert_eq!(lab.instar(&["--resize-backing", "top"]).status, 0);
    assert!(lab.qemu_img(&["info", "base"]).contains("2 MiB (2097152 bytes)"));
    lab.qemu_img(&["check", "base"]);
}

#[test]
fn bad_usage() {
    let lab = Lab::pair();
    assert_eq!(lab.instar(&[]).status, 2);
    assert_eq!(lab.instar(&["top", "base"]).status, 2);
    assert_eq!(lab.instar(&["-t", "bogus", "top"]).status, 2);
}

#[test]
fn what_is_not_an_image() {
    let lab = Lab::pair();
    assert!(Command::new("mkfifo").arg(lab.path("fifo")).status().unwrap().success());
    std::fs::create_dir(lab.path("dir")).unwrap();
    lab.refused(&["fifo"], ErrorCode::OpenFailed, &["is not a regular file"]);
    lab.refused(&["dir"], ErrorCode::OpenFailed, &["is a directory"]);
    lab.refused(&["/dev/null"], ErrorCode::OpenFailed, &["is not a regular file"]);
    lab.qemu_img(&["rebase", "-u", "-F", "qcow2", "-b", "fifo", "top"]);
    lab.refused(&["top"], ErrorCode::OpenFailed, &["/fifo'", "is not a regular file"]);
}

#[test]
fn an_image_in_use_is_refused() {
    let lab = Lab::pair();
    lab.create("sibling", Some("base"), 64 * MIB);
    for (image, shown) in [("top", "top'"), ("base", "/base'"), ("sibling", "/base'")] {
        let user = InUse::new(&lab, image);
        let who = format!("is in use by another process (qemu-io, process {}): stop it", user.0.id());
        lab.refused(&["top"], ErrorCode::ImageInUse, &[&who, "--wait SECONDS", "block-commit", shown]);
        lab.refused(
            &["--wait", "1", "top"],
            ErrorCode::ImageInUse,
            &["still in use", " after 1 s", "block-commit", shown],
        );
        user.end();
    }
    lab.committed(&["--ignore-siblings", "top"], "top", "base");
}

/// Something that has an image open and locked, until it is told to end.
struct InUse(std::process::Child);

impl InUse {
    fn new(lab: &Lab, image: &str) -> Self {
        let mut child = Command::new("qemu-io");
        child.current_dir(lab.dir.path()).arg(image).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = child.spawn().unwrap();
        // The prompt comes when the image is open and locked.
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        Self(child)
    }

    fn end(mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

/// A commit that waits for images in use, once it has found one to be.
fn waiting(lab: &Lab, seconds: &str) -> std::process::Child {
    let mut instar = instar_test_lab::instar("commit");
    instar.arg("--plugin-dir").arg(lab.plugins().path());
    instar.args(["--ignore-siblings", "--wait", seconds, "top"]).current_dir(lab.dir.path());
    let mut child = instar.stderr(Stdio::piped()).spawn().unwrap();
    // In a pause between two tries: nothing else sleeps before the guest runs.
    let wchan = format!("/proc/{}/wchan", child.id());
    while !std::fs::read_to_string(&wchan).unwrap_or_default().contains("nanosleep") {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        std::thread::yield_now();
    }
    child
}

#[test]
fn an_image_in_use_is_waited_for() {
    for image in ["top", "base"] {
        let lab = Lab::pair();
        lab.qemu_img(&["convert", "-O", "raw", "top", "want"]);
        let user = InUse::new(&lab, image);
        let commit = waiting(&lab, "600");
        user.end();
        let output = commit.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        lab.qemu_img(&["compare", "-q", "base", "want"]);
    }
}

/// What is waited for is what its user leaves, and not what it was when it was opened.
#[test]
fn a_backing_that_grew_meanwhile() {
    let lab = Lab::pair();
    let mut user = InUse::new(&lab, "base");
    let commit = waiting(&lab, "600");
    let prompt = user.0.stdin.as_mut().unwrap();
    std::io::Write::write_all(prompt, b"write -P 8 50M 4M\n").unwrap();
    user.end();
    let output = commit.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    lab.io("base", &["read -P 8 50M 4M", "read -P 3 1M 1M", "read -P 4 30M 100k"]);
    lab.qemu_img(&["check", "-q", "base"]);
}

#[test]
fn two_that_wait_do_not_block_each_other() {
    let lab = Lab::pair();
    lab.create("other", Some("base"), 64 * MIB);
    lab.io("other", &["write -P 6 40M 1M"]);
    let user = InUse::new(&lab, "base");
    let commit = waiting(&lab, "600");
    // It holds no lock on what it waits for, so that one of the two is first.
    user.end();
    let other = lab.instar(&["--ignore-siblings", "--wait", "600", "other"]);
    assert_eq!(other.status, 0, "{}", other.stderr);
    let commit = commit.wait_with_output().unwrap();
    assert!(commit.status.success(), "{}", String::from_utf8_lossy(&commit.stderr));
    lab.io("base", &["read -P 6 40M 1M", "read -P 3 1M 1M"]);
}

#[test]
fn a_signal_ends_the_wait() {
    let lab = Lab::pair();
    let before = lab.files();
    let user = InUse::new(&lab, "top");
    let commit = waiting(&lab, "600");
    // SAFETY: it is our own child.
    unsafe { libc::kill(i32::try_from(commit.id()).unwrap(), libc::SIGTERM) };
    let output = commit.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("top': interrupted while waiting"), "{stderr}");
    user.end();
    assert!(lab.files() == before);
}

#[test]
fn block_devices() {
    let lab = Lab::pair();
    let file = std::fs::File::create_new(lab.path("disk")).unwrap();
    file.set_len(80 * MIB).unwrap();
    let Some(device) = LoopDevice::new(&lab.path("disk")) else {
        eprintln!("skipped: no loop devices here");
        return;
    };
    let base = lab.path("base");
    lab.create(&device.0, Some(base.to_str().unwrap()), 64 * MIB);
    lab.io(&device.0, &["write -P 7 2M 1M", "write -P 8 40M 64k"]);
    lab.refused(&[&device.0], ErrorCode::WriteTargetNotAllowed, &["--allow-backing-dir"]);
    // The file below the device is the overlay itself.
    std::fs::remove_file(lab.path("top")).unwrap();
    lab.committed(&["-b", base.to_str().unwrap(), &device.0], &device.0, "base");
}

#[test]
fn a_qcow2_backing_on_a_block_device_has_the_room_that_the_device_has() {
    for (mib, fits) in [(80, true), (2, false)] {
        let lab = Lab::new();
        let file = std::fs::File::create_new(lab.path("disk")).unwrap();
        file.set_len(mib * MIB).unwrap();
        let Some(device) = LoopDevice::new(&lab.path("disk")) else {
            eprintln!("skipped: no loop devices here");
            return;
        };
        lab.create(&device.0, None, 64 * MIB);
        lab.create("top", Some(&device.0), 64 * MIB);
        lab.io("top", &["write -P 7 2M 1M", "write -P 8 60M 1M"]);
        if fits {
            lab.committed(&["-b", &device.0, "top"], "top", &device.0);
            continue;
        }
        let before = read(lab.path("disk")).unwrap();
        let outcome = lab.instar(&["-b", &device.0, "top"]);
        // Past the end of the device there is nothing.
        assert!(outcome.status == 1 && outcome.stderr.contains("nothing was changed"), "{}", outcome.stderr);
        assert!(read(lab.path("disk")).unwrap() == before);
    }
}

#[test]
fn ancestors_may_lie_anywhere_in_the_tree_of_the_overlay() {
    let lab = Lab::new();
    std::fs::create_dir(lab.path("sub")).unwrap();
    lab.create("root", None, 4 * MIB);
    lab.io("root", &["write -P 1 0 4M"]);
    lab.create("sub/base", Some("../root"), 4 * MIB);
    lab.create("top", Some("sub/base"), 4 * MIB);
    lab.io("top", &["write -P 7 100k 10k"]);
    lab.committed(&["top"], "top", "sub/base");
}

#[test]
fn verbose_tells_what_was_done() {
    let lab = Lab::pair();
    let outcome = lab.committed(&["-v", "top"], "top", "base");
    for words in ["plugin qcow2", "overlay ", "backing ", "ring 3", "copied in the kernel", "time: "] {
        assert!(outcome.stderr.contains(words), "{words}: {}", outcome.stderr);
    }
    assert_eq!(outcome.stdout, "Image committed.\n");
    // A refusal as well.
    let outcome = lab.instar(&["-v", "base"]);
    assert!(outcome.status == 1 && outcome.stderr.contains("instar: overlay "), "{}", outcome.stderr);
    assert!(outcome.stderr.lines().last().unwrap().contains("no recorded backing file"));
}

#[test]
fn what_is_locked_here_qemu_refuses() {
    let lab = Lab::pair();
    let qemu_io = |arguments: &[&str]| {
        let output = Command::new("qemu-io").args(arguments).current_dir(lab.dir.path()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        !String::from_utf8_lossy(&text).contains("lock")
    };
    for (access, others_read) in [(Access::ReadWrite, false), (Access::ReadOnly, true)] {
        let image = OpenedFile::named(&lab.path("base"), access, ErrorCode::OpenFailed).unwrap();
        let image = image.lock(access).unwrap();
        assert!(!qemu_io(&["-c", "read 0 512", "base"]));
        assert_eq!(qemu_io(&["-r", "-c", "read 0 512", "base"]), others_read);
        drop(image);
        assert!(qemu_io(&["-c", "read 0 512", "base"]));
    }
}

#[test]
fn a_signal_stops_at_a_safe_point() {
    let lab = Lab::new();
    lab.create("base", None, 2 << 30);
    lab.create("top", Some("base"), 2 << 30);
    // Scattered, so that there is something to do.
    let writes: Vec<String> = (0..400).map(|i| format!("write -P {} {}k 64k", i % 250 + 1, i * 4096)).collect();
    lab.io("top", &writes.iter().map(String::as_str).collect::<Vec<_>>());
    lab.qemu_img(&["convert", "-O", "raw", "top", "want"]);
    let mut stopped = 0;
    for delay in [15, 20, 25, 30, 40, 60] {
        let mut command = instar_test_lab::instar("commit");
        command.args(["--output", "json", "--plugin-dir"]).arg(lab.plugins().path()).arg("top");
        command.current_dir(lab.dir.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        let pid = i32::try_from(child.id()).unwrap();
        // SAFETY: sends a signal to a child that has not been waited for.
        unsafe { libc::kill(pid, libc::SIGINT) };
        let output = child.wait_with_output().unwrap();
        // A signal before the program listens ends it at once.
        if output.status.code() == Some(1) {
            let value: Value = serde_json::from_slice(&output.stderr).unwrap();
            assert_eq!(value["error"]["name"], "ERROR_INTERRUPTED", "{value}");
            stopped += 1;
        }
        lab.qemu_img(&["compare", "-q", "top", "want"]);
        for image in ["base", "top"] {
            let mut check = Command::new("qemu-img");
            let status = check.args(["check", "-q", image]).current_dir(lab.dir.path()).stdout(Stdio::null()).status();
            // 3: leaks, and no errors.
            assert!(matches!(status.unwrap().code(), Some(0 | 3)), "{image}");
        }
    }
    eprintln!("{stopped} commits were stopped");
    assert_eq!(lab.instar(&["top"]).status, 0);
    for image in ["base", "top"] {
        lab.qemu_img(&["compare", "-q", image, "want"]);
    }
}
