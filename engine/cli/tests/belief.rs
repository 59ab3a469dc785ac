//! Who is believed about the format of a file that is written to; and what cannot be written to at all.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use instar_guest_abi::ErrorCode;
use instar_test_lab::lab::{Lab, LoopDevice, MIB};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A raw `base` that begins with `start`, and `top` over it, which records it as raw and holds a MiB of data.
fn over_raw(start: &[u8], length: u64) -> Lab {
    let lab = Lab::new();
    lab.plugins().copy("vmdk", &instar_test_lab::built("instar_plugin_vmdk"));
    let base = fs::File::create(lab.path("base")).unwrap();
    base.set_len(length).unwrap();
    base.write_all_at(start, 0).unwrap();
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", "top", &(4 * MIB).to_string()]);
    lab.io("top", &["write -P 5 1M 1M"]);
    lab
}

/// The first sector of a qcow2 image.
fn a_header(lab: &Lab) -> Vec<u8> {
    lab.create("header", None, MIB);
    let header = fs::read(lab.path("header")).unwrap()[..512].to_vec();
    fs::remove_file(lab.path("header")).unwrap();
    header
}

/// What the guest sees of `top`.
fn content(lab: &Lab) -> Vec<u8> {
    lab.qemu_img(&["convert", "-O", "raw", "top", "want"]);
    let content = fs::read(lab.path("want")).unwrap();
    fs::remove_file(lab.path("want")).unwrap();
    content
}

/// The commit succeeds, and the raw base is what the overlay was.
fn committed_raw(lab: &Lab, args: &[&str]) {
    let want = content(lab);
    let outcome = lab.instar(args);
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    assert!(fs::read(lab.path("base")).unwrap() == want);
    assert!(content(lab) == want);
}

#[test]
fn a_recorded_raw_that_looks_like_another_format_is_believed_of_the_operator() {
    let header = a_header(&Lab::new());
    let lab = over_raw(&header, 4 * MIB);
    let words = ["/base': looks like a qcow2 image", "top' records it as raw", "add -F raw", "add -F qcow2"];
    lab.refused(&["top"], ErrorCode::FormatMismatch, &words);
    lab.refused(&["-b", "base", "top"], ErrorCode::FormatMismatch, &words);
    committed_raw(&lab, &["-F", "raw", "top"]);
}

/// An overlay in which the guest writes `start` at the beginning of its disk, over a raw base.
fn guest_writes(start: &[u8]) -> Lab {
    let lab = over_raw(&[], 4 * MIB);
    let file = lab.path("start");
    fs::write(&file, start).unwrap();
    lab.io("top", &[&format!("write -s {} 0 {}", file.display(), start.len())]);
    lab
}

#[test]
fn a_commit_that_wrote_the_mark_itself_is_repeated() {
    let header = a_header(&Lab::new());
    let lab = guest_writes(&header);
    committed_raw(&lab, &["-d", "top"]);
    // It is told from one into somebody else's image by its writes, of which a dry run makes none.
    lab.refused(&["--dry-run", "top"], ErrorCode::FormatMismatch, &["looks like a qcow2 image", "add -F raw"]);
    committed_raw(&lab, &["-d", "top"]);
    // Interrupted after the first of its writes.
    let base = fs::OpenOptions::new().write(true).open(lab.path("base")).unwrap();
    base.set_len(64 << 10).unwrap();
    base.set_len(4 * MIB).unwrap();
    committed_raw(&lab, &["top"]);
}

#[test]
fn an_overlay_with_a_copy_of_the_mark_does_not_change_a_header() {
    let header = a_header(&Lab::new());
    let words = ["/base': looks like a qcow2 image", "add -F raw", "nothing was changed"];
    for place in [7, 8, 511, 40_000, 65_535] {
        let lab = guest_writes(&header);
        let mut other = fs::read(lab.path("base")).unwrap();
        other[..512].copy_from_slice(&header);
        other[place] ^= 1;
        fs::write(lab.path("base"), &other).unwrap();
        lab.refused(&["top"], ErrorCode::FormatMismatch, &words);
    }
    // What the overlay does not hold is not its own.
    let lab = over_raw(&header, 4 * MIB);
    lab.io("top", &["write -P 7 3M 64k"]);
    lab.refused(&["top"], ErrorCode::FormatMismatch, &words);
}

#[test]
fn the_operators_format_counts_and_not_the_recorded_one() {
    let lab = Lab::new();
    lab.create("base", None, 4 * MIB);
    lab.io("base", &["write -P 1 0 4M"]);
    lab.create("top", Some("base"), 4 * MIB);
    lab.io("top", &["write -P 5 1M 1M"]);
    let want = content(&lab);
    lab.qemu_img(&["rebase", "-q", "-u", "-F", "raw", "-b", "base", "top"]);
    lab.refused(&["top"], ErrorCode::FormatMismatch, &["add -F qcow2"]);
    lab.refused(&["-F", "nonsense", "top"], ErrorCode::PluginUnavailable, &["/base'", "nonsense"]);
    let outcome = lab.instar(&["-F", "qcow2", "top"]);
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    fs::write(lab.path("want"), want).unwrap();
    lab.qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", "base", "want"]);
}

#[test]
fn a_format_that_the_file_is_not_of_is_refused() {
    let lab = over_raw(&[7; 512], 4 * MIB);
    let words = ["/base': is no qcow2 image", "records it as raw: leave out -F qcow2"];
    lab.refused(&["-F", "qcow2", "top"], ErrorCode::FormatMismatch, &words);
}

/// Nothing but a slip of the operator's speaks for raw: the overlay and the file both say that it is something else.
#[test]
fn a_format_that_everything_else_contradicts_is_refused() {
    let lab = Lab::new();
    lab.create("base", None, 4 * MIB);
    lab.io("base", &["write -P 1 0 4M"]);
    lab.create("top", Some("base"), MIB);
    lab.io("top", &["write -P 5 0 1M"]);
    let words =
        ["/base': is a qcow2 image", "records it as one", "leave out -F raw", "instar rebase -u -b 'base' -F raw"];
    lab.refused(&["-F", "raw", "top"], ErrorCode::FormatMismatch, &words);
    lab.refused(&["-F", "raw", "--resize-backing", "--dry-run", "top"], ErrorCode::FormatMismatch, &words);
    // What it advises is taken.
    lab.qemu_img(&["rebase", "-q", "-u", "-F", "raw", "-b", "base", "top"]);
    lab.refused(&["top"], ErrorCode::FormatMismatch, &["add -F raw"]);
    assert_eq!(lab.instar(&["-F", "raw", "top"]).status, 0);
}

#[test]
fn a_mark_that_is_only_likely_does_not_outweigh_what_is_recorded() {
    let text = b"# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n";
    committed_raw(&over_raw(text, 4 * MIB), &["top"]);
    // A descriptor, and no disk.
    let lab = over_raw(text, text.len() as u64);
    lab.refused(&["--resize-backing", "top"], ErrorCode::FormatMismatch, &["looks like a vmdk image", "add -F raw"]);
}

#[test]
fn a_raw_image_that_is_only_read_may_look_like_anything() {
    let lab = over_raw(&a_header(&Lab::new()), 4 * MIB);
    fs::rename(lab.path("top"), lab.path("middle")).unwrap();
    lab.qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "middle", "top"]);
    // A part of the first cluster: the rest comes from below.
    lab.io("top", &["write -P 9 4k 4k"]);
    let before = fs::read(lab.path("base")).unwrap();
    let want = content(&lab);
    let outcome = lab.instar(&["top"]);
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    assert!(content(&lab) == want);
    fs::rename(lab.path("middle"), lab.path("top")).unwrap();
    assert!(content(&lab) == want);
    assert!(fs::read(lab.path("base")).unwrap() == before);
}

#[test]
fn what_begins_like_nothing_is_said_to_be_damaged_and_where_it_is_in_the_chain() {
    let lab = Lab::pair();
    // QEMU makes no image any more that records no format: its extension becomes an unknown one.
    let image = fs::read(lab.path("top")).unwrap();
    let at = image.windows(4).position(|bytes| bytes == 0xe279_2acau32.to_be_bytes()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(lab.path("top")).unwrap();
    file.write_all_at(b"none", at as u64).unwrap();
    let spoil = |name: &str| {
        let file = fs::OpenOptions::new().write(true).open(lab.path(name)).unwrap();
        file.write_all_at(b"XXXX", 0).unwrap();
    };
    lab.create("over", Some("top"), 64 * MIB);
    spoil("base");
    let damaged = ["begins like no known format (qcow2", "its header is damaged: restore it, and do not call it raw"];
    let words = [&["/base': ", "top', which it is the backing of", "add -F raw"][..], &damaged].concat();
    lab.refused(&["top"], ErrorCode::UnsupportedFormat, &words);
    lab.refused(
        &["over"],
        ErrorCode::UnsupportedFormat,
        &["/base': ", "top', which", "record that with `instar rebase -u -b 'base' -F raw"],
    );
    lab.create("recorded", Some("base"), 64 * MIB);
    let recorded = ["/base': does not begin like", "recorded' records it as qcow2", "header is damaged: restore it"];
    lab.refused(&["recorded"], ErrorCode::FormatMismatch, &recorded);
    spoil("top");
    lab.refused(&["top"], ErrorCode::UnsupportedFormat, &[&["top': "][..], &damaged].concat());
}

#[test]
fn a_luks_backing_is_encrypted_and_not_unknown() {
    let lab = Lab::new();
    lab.qemu_img(&[
        "create",
        "-q",
        "-f",
        "luks",
        "--object",
        "secret,id=key,data=words",
        "-o",
        "key-secret=key,iter-time=10",
        "base",
        "4M",
    ]);
    for format in ["luks", "qcow2"] {
        lab.qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", "base", "top", "4M"]);
        lab.refused(&["top"], ErrorCode::LuksUnsupported, &["/base': is encrypted with LUKS"]);
    }
    lab.refused(&["base"], ErrorCode::LuksUnsupported, &["base': is encrypted with LUKS"]);
}

/// Refused before anything, also in a dry run.
fn read_only(lab: &Lab, words: &[&str]) {
    for args in [&["top"][..], &["--dry-run", "top"]] {
        lab.refused(args, ErrorCode::ReadOnly, words);
    }
}

#[test]
fn a_read_only_block_device() {
    let lab = over_raw(&[1; 512], 4 * MIB);
    let Some(device) = LoopDevice::new(&lab.path("base")) else {
        eprintln!("not tested: no loop devices here");
        return;
    };
    lab.qemu_img(&["rebase", "-q", "-u", "-F", "raw", "-b", &device.0, "top"]);
    let set = |how: &str| assert!(Command::new("blockdev").args([how, &device.0]).status().unwrap().success());
    set("--setro");
    for args in [&["-b", &device.0, "top"][..], &["-b", &device.0, "--dry-run", "top"]] {
        lab.refused(args, ErrorCode::ReadOnly, &[&device.0, "is a read-only block device", "blockdev --setrw"]);
    }
    set("--setrw");
    let want = content(&lab);
    let outcome = lab.instar(&["-b", &device.0, "top"]);
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    assert!(fs::read(lab.path("base")).unwrap() == want);
}

#[test]
fn an_immutable_file() {
    let lab = Lab::pair();
    let base = lab.path("base");
    let chattr =
        |how: &str| Command::new("chattr").arg(how).arg(&base).output().is_ok_and(|done| done.status.success());
    for (set, clear) in [("+i", "-i"), ("+a", "-a")] {
        if !chattr(set) {
            eprintln!("not tested: no attributes here");
            return;
        }
        let refused = std::panic::catch_unwind(|| read_only(&lab, &["/base'", "is immutable", "chattr -i -a"]));
        assert!(chattr(clear));
        refused.unwrap();
    }
    lab.committed(&["top"], "top", "base");
}

#[test]
fn a_read_only_file_system() {
    let lab = Lab::pair();
    fs::create_dir(lab.path("store")).unwrap();
    let store = lab.path("store");
    let mount =
        |args: &[&str]| Command::new("mount").args(args).arg(&store).output().is_ok_and(|done| done.status.success());
    if !mount(&["-t", "tmpfs", "none"]) {
        eprintln!("not tested: nothing can be mounted here");
        return;
    }
    fs::rename(lab.path("base"), store.join("base"))
        .or_else(|_| fs::copy(lab.path("base"), store.join("base")).map(drop))
        .unwrap();
    lab.qemu_img(&["rebase", "-q", "-u", "-F", "qcow2", "-b", "store/base", "top"]);
    assert!(mount(&["-o", "remount,ro"]));
    let refused = std::panic::catch_unwind(|| read_only(&lab, &["/store/base'", "is on a read-only file system"]));
    assert!(Command::new("umount").arg(&store).status().unwrap().success());
    refused.unwrap();
}

/// As another user, since nothing is forbidden to root.
#[test]
fn permission_denied_is_not_read_only_and_not_absent() {
    let lab = Lab::pair();
    fs::set_permissions(lab.dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    fs::set_permissions(lab.path("top"), PermissionsExt::from_mode(0o666)).unwrap();
    fs::set_permissions(lab.path("base"), PermissionsExt::from_mode(0o444)).unwrap();
    let run = |name: &str| {
        let mut instar = instar_test_lab::instar("commit");
        instar.args(["--output", "json", "--plugin-dir"]).arg(lab.plugins().path());
        let output = instar.arg(lab.path(name)).uid(65534).gid(65534).output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let denied = run("top");
    assert!(denied.contains("\"ERROR_PERMISSION_DENIED\"") && denied.contains("/base'"), "{denied}");
    assert!(run("absent").contains("\"ERROR_IMAGE_NOT_FOUND\""));
}
