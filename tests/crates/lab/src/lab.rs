//! A directory of images on which the program is run.

use super::{boxed_registry, instar, PluginDir};
use instar_guest_abi::ErrorCode;
use serde_json::Value;
use std::fs::read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

/// A directory of images, and one of plugins.
pub struct Lab {
    pub dir: TempDir,
    plugins: PluginDir,
}

pub struct Outcome {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Lab {
    pub fn new() -> Self {
        Self { dir: TempDir::new().unwrap(), plugins: boxed_registry().0 }
    }

    /// `base` with data, and `top` over it with other data.
    pub fn pair() -> Self {
        let lab = Self::new();
        lab.create("base", None, 64 * MIB);
        lab.io("base", &["write -P 1 0 4M", "write -P 2 20M 1M"]);
        lab.create("top", Some("base"), 64 * MIB);
        lab.io("top", &["write -P 3 1M 1M", "write -P 4 30M 100k", "write -z 20M 512k"]);
        lab
    }

    pub fn plugins(&self) -> &PluginDir {
        &self.plugins
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn qemu_img(&self, args: &[&str]) -> String {
        let output = Command::new("qemu-img").args(args).current_dir(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A qcow2 image whose recorded backing may be any text.
    pub fn create(&self, name: &str, backing: Option<&str>, size: u64) {
        let size = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if let Some(backing) = backing {
            args.extend(["-u", "-F", "qcow2", "-b", backing]);
        }
        args.extend([name, &size]);
        self.qemu_img(&args);
    }

    pub fn io(&self, name: &str, commands: &[&str]) {
        let mut program = Command::new("qemu-io");
        program.args(["-f", "qcow2"]).current_dir(self.dir.path()).stdout(Stdio::null());
        for command in commands {
            program.args(["-c", command]);
        }
        assert!(program.arg(name).status().unwrap().success());
    }

    pub fn instar(&self, args: &[&str]) -> Outcome {
        let mut command = instar("commit");
        command.arg("--plugin-dir").arg(self.plugins.path()).args(args);
        let output = command.current_dir(self.dir.path()).output().unwrap();
        Outcome {
            status: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> =
            entries.filter(|path| path.is_file()).map(|path| (path.clone(), read(path).unwrap())).collect();
        files.sort();
        files
    }

    /// The commit is refused with this code and these words, in both outputs, and nothing is changed.
    pub fn refused(&self, args: &[&str], code: ErrorCode, words: &[&str]) {
        let before = self.files();
        let human = self.instar(args);
        assert_eq!((human.status, human.stdout.as_str()), (1, ""), "{args:?}: {}", human.stderr);
        assert_eq!(human.stderr.lines().count(), 1, "{}", human.stderr);
        assert!(human.stderr.starts_with("instar: ") && !human.stderr.contains('\x1b'), "{}", human.stderr);
        let json = self.instar(&[&["--output", "json"], args].concat());
        let value: Value = serde_json::from_str(&json.stderr).unwrap_or_else(|e| panic!("{e}: {}", json.stderr));
        let error = &value["error"];
        assert_eq!(error["name"], code.name(), "{args:?}: {}", json.stderr);
        assert_eq!(error["code"], code.number());
        let message = error["message"].as_str().unwrap();
        assert_eq!(human.stderr.trim_end(), format!("instar: {message} ({})", code.name()));
        for word in words {
            assert!(message.contains(word), "{args:?}: no {word:?} in {message}");
        }
        assert!(self.files() == before, "{args:?}: files were changed");
    }

    /// The commit succeeds, and both images read as the overlay did.
    pub fn committed(&self, args: &[&str], top: &str, base: &str) -> Outcome {
        let want = format!("{top}.want");
        self.qemu_img(&["convert", "-O", "raw", top, &want]);
        let outcome = self.instar(args);
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        for image in [top, base] {
            self.qemu_img(&["compare", "-q", image, &want]);
            self.qemu_img(&["check", "-q", image]);
        }
        outcome
    }
}

/// A loop device, detached again at the end.
pub struct LoopDevice(pub String);

impl LoopDevice {
    pub fn new(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8(output.stdout).unwrap();
        output.status.success().then(|| Self(name.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        assert!(Command::new("losetup").arg("--detach").arg(&self.0).status().unwrap().success());
    }
}
