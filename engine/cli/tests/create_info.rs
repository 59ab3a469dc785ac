//! `instar create` and `instar info` against `qemu-img`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use instar_guest_abi::ErrorCode;
use instar_test_lab::instar;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A refusal, as it was printed.
#[derive(Debug)]
struct Refused {
    code: ErrorCode,
    message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl Refused {
    /// `instar: MESSAGE (CODE)`.
    fn parse(line: &str) -> Self {
        let line = line.trim_end_matches('\n').strip_prefix("instar: ").unwrap_or_else(|| panic!("{line}"));
        let (message, name) = line.strip_suffix(')').and_then(|line| line.rsplit_once(" (")).unwrap();
        let code = ErrorCode::ALL.iter().find(|code| code.name() == name).unwrap();
        Self { code: *code, message: message.to_owned() }
    }
}

struct Place {
    dir: TempDir,
    plugins: instar_test_lab::PluginDir,
}

impl Place {
    fn new() -> Self {
        let (plugins, _) = instar_test_lab::boxed_registry();
        Self { dir: TempDir::new().unwrap(), plugins }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Run a command; a word that begins with `@` is a name in this place.
    fn run(&self, line: &str) -> Result<String, Refused> {
        let words = line.split_whitespace().map(|word| match word.strip_prefix('@') {
            Some(name) => self.at(name).to_str().unwrap().to_owned(),
            None => word.to_owned(),
        });
        let mut words: Vec<String> = words.collect();
        words.extend(["--plugin-dir".to_owned(), self.plugins.path().to_str().unwrap().to_owned()]);
        let (command, options) = words.split_first().unwrap();
        let output = instar(command).args(options).output().unwrap();
        let (out, said) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        if output.status.success() {
            return Ok(out);
        }
        assert!(out.is_empty() && output.status.code() != Some(101), "{out}{said}");
        Err(Refused::parse(&said))
    }

    fn error(&self, line: &str) -> Refused {
        let error = self.run(line).unwrap_err();
        assert!(!error.message.contains('\n'), "{error:?}");
        error
    }

    fn info(&self, name: &str) -> Value {
        serde_json::from_str(&self.run(&format!("info --output json @{name}")).unwrap()).unwrap()
    }
}

fn qemu_img(dir: &Path, args: &[&str]) -> Option<String> {
    let output = match Command::new("qemu-img").current_dir(dir).args(args).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => panic!("{error}"),
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "qemu-img {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    Some(text)
}

/// `qemu-img info`, without what it says about the file below the image and the blocks in use.
fn comparable(mut info: Value) -> Value {
    let map = info.as_object_mut().unwrap();
    for key in ["children", "actual-size", "filename", "full-backing-filename"] {
        map.remove(key);
    }
    info
}

#[test]
fn every_cluster_size_and_version_is_what_qemu_img_makes() {
    let place = Place::new();
    let dir = place.dir.path();
    if qemu_img(dir, &["--version"]).is_none() {
        eprintln!("skipped: there is no qemu-img");
        return;
    }
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "base.qcow2", "70M"]);
    let more = ["", ",refcount_bits=1", ",refcount_bits=64,lazy_refcounts=on", ",compression_type=zstd"];
    for bits in 9..=21 {
        for compat in ["0.10", "1.1"] {
            for more in if compat == "1.1" { &more[..] } else { &more[..1] } {
                for backing in [false, true] {
                    let options = format!("cluster_size={},compat={compat}{more}", 1u32 << bits);
                    let backed: &[&str] = if backing { &["-b", "base.qcow2", "-F", "qcow2"] } else { &[] };
                    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options, "theirs"];
                    args.extend(backed);
                    args.extend(if backing { &[][..] } else { &["100000001"][..] });
                    qemu_img(dir, &args);
                    let size = if backing { "" } else { "100000001" };
                    let backed = backed.join(" ");
                    place.run(&format!("create -f qcow2 -q -o {options} {backed} @ours {size}")).unwrap();

                    qemu_img(dir, &["check", "-q", "ours"]);
                    let show = |name| {
                        serde_json::from_str::<Value>(&qemu_img(dir, &["info", "--output", "json", name]).unwrap())
                            .unwrap()
                    };
                    let (theirs, ours) = (show("theirs"), show("ours"));
                    assert_eq!(comparable(ours.clone()), comparable(theirs.clone()), "{options} {backed}");
                    // And `instar info` says the same of both.
                    assert_eq!(comparable(place.info("theirs")), comparable(theirs), "{options} {backed}");
                    assert_eq!(comparable(place.info("ours")), comparable(ours), "{options} {backed}");

                    let (a, b) = (std::fs::read(place.at("ours")).unwrap(), std::fs::read(place.at("theirs")).unwrap());
                    assert!(a == b, "{options} {backed}: the files differ ({} and {} bytes)", a.len(), b.len());
                }
            }
        }
    }
}

#[test]
fn large_tables_are_clean() {
    let place = Place::new();
    for (options, size) in [
        ("cluster_size=512", "100G"),
        ("cluster_size=512,refcount_bits=64", "128G"),
        ("cluster_size=64k", "1P"),
        ("cluster_size=2M,refcount_bits=1", "7E"),
        ("cluster_size=64k", "0"),
    ] {
        let made = place.run(&format!("create -f qcow2 -q -o {options} @big {size}"));
        if let Err(error) = made {
            // An L1 table of more than 32 MiB: qemu-img refuses it as well.
            assert_eq!(size, "7E", "{error}");
            assert!(error.message.contains("too large"), "{error}");
            continue;
        }
        qemu_img(place.dir.path(), &["check", "-q", "big"]);
        assert_eq!(place.info("big")["virtual-size"], instar_cli::size::parse_size(size).unwrap());
    }
}

#[test]
fn mistakes_are_named_and_change_nothing() {
    let place = Place::new();
    std::fs::write(place.at("precious"), b"precious").unwrap();
    for (line, words) in [
        ("create -f qcow2 -o bogus=1 @precious 1M", "unknown option \"bogus\": there are cluster_size, compat"),
        ("create -f qcow2 -o cluster_size=3 @precious 1M", "power of two from 512 to 2M"),
        ("create -f qcow2 -o compat=0.10,refcount_bits=8 @precious 1M", "need compat=1.1"),
        ("create -f qcow2 -o cluster_size @precious 1M", "needs a value"),
        ("create -f qcow2 @precious", "needs a SIZE"),
        ("create -f qcow2 @precious 1Q", "the size '1Q' is not a number of bytes"),
        ("create -f qcow2 @precious 9E", "the size '9E' is more than 2^63"),
        ("create -f qcow2 -b base @precious 1M", "add -F FMT"),
        ("create -f qcow2 -b missing -F qcow2 @precious", "does not exist"),
        ("create -f qcow2 -b precious -F qcow2 @precious", "cannot be backed by itself"),
        ("create -f qcow2 -b nbd:x -F qcow2 @precious 1M", "not the name of a file"),
        ("create -f zzz @precious 1M", "unknown format 'zzz': the plugins that are loaded are for qcow2"),
    ] {
        let error = place.error(line);
        assert!(error.message.contains(words), "{line}: {error}");
        assert_eq!(std::fs::read(place.at("precious")).unwrap(), b"precious");
    }
    std::fs::write(place.at("not-qcow2"), vec![0; 5000]).unwrap();
    let error = place.error("create -f qcow2 -b not-qcow2 -F qcow2 @new");
    assert_eq!(error.code, ErrorCode::FormatMismatch);
    assert!(!place.at("new").exists());
    // A raw backing has a size as well.
    place.run("create -f qcow2 -q -b not-qcow2 -F raw @new").unwrap();
    assert_eq!(place.info("new")["virtual-size"], 5120);
}

#[test]
fn an_image_below_the_backing_is_not_overwritten() {
    let place = Place::new();
    place.run("create -f qcow2 -q @lowest 1M").unwrap();
    for (image, base) in [("middle", "lowest"), ("upper", "middle")] {
        place.run(&format!("create -f qcow2 -q -b {base} -F qcow2 @{image}")).unwrap();
    }
    for image in ["lowest", "middle"] {
        let before = std::fs::read(place.at(image)).unwrap();
        let error = place.error(&format!("create -f qcow2 -b upper -F qcow2 @{image}"));
        assert!(error.code == ErrorCode::ChainLoop && error.message.contains("would be overwritten"), "{error}");
        assert_eq!(std::fs::read(place.at(image)).unwrap(), before);
    }
    // Any other file is, also where the chain cannot be followed to its end.
    std::fs::remove_file(place.at("lowest")).unwrap();
    std::fs::write(place.at("other"), "other").unwrap();
    place.run("create -f qcow2 -q -b upper -F qcow2 @other").unwrap();
    assert_eq!(place.info("other")["virtual-size"], 1 << 20);
}

#[test]
fn an_image_in_use_is_not_overwritten() {
    let place = Place::new();
    place.run("create -f qcow2 -q @image 1M").unwrap();
    let before = std::fs::read(place.at("image")).unwrap();
    let mut holder = match Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(place.at("image"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
    {
        Ok(holder) => holder,
        Err(_) => return eprintln!("skipped: there is no qemu-io"),
    };
    // Wait until it has the image open: it answers.
    use std::io::{Read, Write};
    holder.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    let mut answer = [0; 1];
    holder.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
    let mut result = place.run("create -f qcow2 -q @image 2M");
    for _ in 0..50 {
        if result.is_err() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        result = place.run("create -f qcow2 -q @image 2M");
    }
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert_eq!(result.unwrap_err().code, ErrorCode::ImageInUse);
    assert_eq!(std::fs::read(place.at("image")).unwrap().len(), before.len());
    place.run("create -f qcow2 -q @image 2M").unwrap();
}

#[test]
fn a_backing_chain_is_shown_and_loops_are_refused() {
    let place = Place::new();
    place.run("create -f qcow2 -q @base 5M").unwrap();
    place.run("create -f qcow2 -q -b base -F qcow2 @mid").unwrap();
    let text = place.run("create -f qcow2 -b mid -F qcow2 @top").unwrap();
    assert!(text.contains("fmt=qcow2 size=5242880 backing_file=mid backing_fmt=qcow2"), "{text}");
    let chain: Value = serde_json::from_str(&place.run("info --backing-chain --output json @top").unwrap()).unwrap();
    assert_eq!(chain.as_array().unwrap().len(), 3);
    assert_eq!(chain[0]["full-backing-filename"], place.at("mid").to_str().unwrap());
    assert_eq!(chain[2]["filename"], place.at("base").to_str().unwrap());
    let human = place.run("info --backing-chain @top").unwrap();
    assert!(human.contains("virtual size: 5 MiB (5242880 bytes)\n"), "{human}");
    assert!(human.contains("    refcount bits: 16\n"), "{human}");

    place.run("create -f qcow2 -q -u -b top -F qcow2 @base 5M").unwrap();
    assert_eq!(place.error("info --backing-chain @top").code, ErrorCode::ChainLoop);
    place.run("create -f qcow2 -q -u -b nbd:host:1 -F raw @remote 5M").unwrap();
    let remote = place.run("info --backing-chain @remote").unwrap();
    assert!(remote.contains("backing file: nbd:host:1 (not a plain file name: not followed)"), "{remote}");
}

#[test]
fn hostile_names_do_not_reach_the_terminal() {
    let place = Place::new();
    let mut name = String::from("a\x1b]0;pwned\x07\u{202e}b");
    name.push_str("\u{9b}2J");
    let words = ["-f", "qcow2", "-u", "-b", &name, "-F", "qc\now2", "--plugin-dir"];
    let mut create = instar("create");
    create.args(words).arg(place.plugins.path()).arg(place.at("x")).arg("1M");
    let out = create.output().unwrap().stdout;
    for text in
        [String::from_utf8(out).unwrap(), place.run("info @x").unwrap(), place.run("info --output json @x").unwrap()]
    {
        assert!(text.chars().all(|c| c == '\n' || !instar::escape::is_hidden(c)), "{text:?}");
    }
    assert_eq!(place.info("x")["backing-filename"], name);
}

#[test]
fn a_wrong_format_is_refused() {
    let place = Place::new();
    place.run("create -f qcow2 -q @image 1M").unwrap();
    assert_eq!(place.error("info -f vdi @image").code, ErrorCode::PluginUnavailable);
    // Any bytes are a raw image, but only for those who say so.
    let raw = place.run("info -f raw @image").unwrap();
    assert!(raw.contains("file format: raw\nvirtual size: 192 KiB (197120 bytes)\n"), "{raw}");
    std::fs::write(place.at("zeroes"), vec![0; 1 << 16]).unwrap();
    assert_eq!(place.error("info -f qcow2 @zeroes").code, ErrorCode::FormatMismatch);
    assert_eq!(place.error("info @zeroes").code, ErrorCode::UnsupportedFormat);
    assert!(place.error("info @missing").message.contains("does not exist"));
    let mut bytes = std::fs::read(place.at("image")).unwrap();
    bytes[20..24].copy_from_slice(&[0, 0, 0, 40]);
    std::fs::write(place.at("damaged"), &bytes).unwrap();
    let error = place.error("info @damaged");
    assert_eq!(error.code, ErrorCode::ParseFailed);
    assert!(error.message.contains("cluster_bits is 40"), "{error}");
}

#[test]
fn plugins_are_listed() {
    let place = Place::new();
    place.plugins.put("broken", b"not a library");
    let text = place.run("plugins").unwrap();
    assert!(text.contains("qcow2 0.1.0: ") && text.contains("roles: source, sink, create"), "{text}");
    assert!(text.contains("libinstar_plugin_broken.so: it is not an ELF file"), "{text}");
    let json: Value = serde_json::from_str(&place.run("plugins --output json").unwrap()).unwrap();
    assert_eq!(json["plugins"][0]["name"], "qcow2");
    assert!(json["skipped"].as_array().unwrap().iter().any(|s| s["path"].as_str().unwrap().contains("broken")));
    assert!(place.run("create -f qcow2 -o help").unwrap().contains("cluster_size=<value>"));
}
