//! One guest module: run cargo, copy the ELF, tell the outer cargo what to watch.

use crate::{dep_info, environment, link};
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Why a guest module could not be built: one paragraph for the person who started the build.
#[derive(Debug)]
pub struct BuildError(String);

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BuildError {}

/// A guest binary to build.
#[derive(Debug)]
pub struct GuestModule {
    package: String,
    folder: PathBuf,
    binary: String,
    out_dir: Option<PathBuf>,
    target_dir: Option<PathBuf>,
}

impl GuestModule {
    /// The binary `binary` of the package named `package` in `folder`, relative to the crate whose build script this
    /// is.
    pub fn new(package: impl Into<String>, folder: impl Into<PathBuf>, binary: impl Into<String>) -> Self {
        Self { package: package.into(), folder: folder.into(), binary: binary.into(), out_dir: None, target_dir: None }
    }

    /// Put the ELF into this folder instead of `OUT_DIR`.
    #[must_use]
    pub fn out_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.out_dir = Some(folder.into());
        self
    }

    /// Build in this target directory instead of `guest` in the outer cargo's.
    #[must_use]
    pub fn target_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.target_dir = Some(folder.into());
        self
    }

    /// Build; the ELF is `OUT_DIR/<binary>.elf`, which is returned. On failure it prints why and ends the build
    /// script with status 1.
    #[must_use = "the path of the ELF; it can also be included from OUT_DIR"]
    pub fn build_path(&self) -> PathBuf {
        match self.try_build() {
            Ok((elf, sources)) => {
                println!("cargo:rerun-if-env-changed={}", link::SYMBOLS_VARIABLE);
                for source in &sources {
                    println!("cargo:rerun-if-changed={}", source.display());
                }
                elf
            }
            Err(error) => {
                eprintln!("error: {error}");
                std::process::exit(1);
            }
        }
    }

    /// [`GuestModule::build_path`] without the path.
    pub fn build(&self) {
        let _ = self.build_path();
    }

    /// Build without printing or exiting: the path of the ELF, and the files it depends on.
    ///
    /// # Errors
    /// A [`BuildError`] that says which module, which command and why.
    pub fn try_build(&self) -> Result<(PathBuf, Vec<PathBuf>), BuildError> {
        let out_dir = self.out_dir.clone().map_or_else(|| variable("OUT_DIR").map(PathBuf::from), Ok)?;
        let folder = Path::new(&variable("CARGO_MANIFEST_DIR")?).join(&self.folder);
        let folder = folder.canonicalize().map_err(|e| self.error(&format!("{}: {e}", folder.display())))?;
        let target_dir = self.target_dir.clone().unwrap_or_else(|| guest_target_dir(&out_dir));
        link::write_script(&target_dir)
            .map_err(|e| self.error(&format!("writing the linker script into {}: {e}", target_dir.display())))?;
        self.run_cargo(&folder, &target_dir)?;

        let release = target_dir.join(link::TARGET).join("release");
        let elf = out_dir.join(format!("{}.elf", self.binary));
        let built = release.join(&self.binary);
        std::fs::create_dir_all(&out_dir)
            .and_then(|()| std::fs::copy(&built, &elf))
            .map_err(|e| self.error(&format!("copying {} to {}: {e}", built.display(), elf.display())))?;
        let dep_file = release.join(format!("{}.d", self.binary));
        let text = std::fs::read_to_string(&dep_file)
            .map_err(|e| self.error(&format!("reading {}: {e}", dep_file.display())))?;
        Ok((elf, dep_info::with_manifests(&dep_info::parse(&text)).into_iter().collect()))
    }

    fn run_cargo(&self, folder: &Path, target_dir: &Path) -> Result<(), BuildError> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let manifest = folder.join("Cargo.toml");
        let mut command = Command::new(cargo);
        // The driver's folder decides which `.cargo/config.toml` holds, not where the outer cargo was called.
        command.current_dir(folder);
        for name in environment::cleared() {
            command.env_remove(name);
        }
        command.env(link::C_FLAGS_VARIABLE, link::C_FLAGS);
        command.args(["build", "--release", "--features", "guest", "--bin", &self.binary]);
        command.args(["--package", &self.package, "--target", link::TARGET]);
        command.arg("--manifest-path").arg(&manifest).arg("--target-dir").arg(target_dir);
        command.env("CARGO_ENCODED_RUSTFLAGS", link::encoded_flags(&remapped(folder)));
        command.env("LIBRARY_PATH", target_dir);
        command.envs(link::PROFILE.iter().copied());
        if std::env::var_os(link::SYMBOLS_VARIABLE).is_some() {
            command.envs(link::WITH_SYMBOLS.iter().copied());
        }
        let output = command.output().map_err(|e| self.error(&format!("cargo could not be started: {e}")))?;
        if output.status.success() {
            return Ok(());
        }
        let shown = String::from_utf8_lossy(&output.stderr);
        Err(self.error(&format!("cargo ended with {}; it said:\n{}", output.status, shown.trim_end())))
    }

    fn error(&self, reason: &str) -> BuildError {
        BuildError(format!(
            "instar-guest-build could not build the guest module `{}` of package `{}` in {}. A guest module is \
             built for {} with the feature `guest`, for which that target of the Rust tool chain and a linker \
             (cc) are needed. {reason}",
            self.binary,
            self.package,
            self.folder.display(),
            link::TARGET
        ))
    }
}

fn variable(name: &str) -> Result<OsString, BuildError> {
    std::env::var_os(name)
        .ok_or_else(|| BuildError(format!("instar-guest-build: {name} is not set; call it from a build script")))
}

/// `guest` in the target directory that `out_dir` (`<target>[/<triple>]/<profile>/build/<package>/out`) is in; in
/// `out_dir` itself if it has another shape.
fn guest_target_dir(out_dir: &Path) -> PathBuf {
    let triple = std::env::var("TARGET").unwrap_or_default();
    let build = out_dir.ancestors().find(|folder| folder.file_name().is_some_and(|name| name == "build"));
    let root = build.and_then(Path::parent).and_then(Path::parent);
    match root {
        Some(root) if !triple.is_empty() && root.ends_with(&triple) => root.parent().unwrap_or(root).join("guest"),
        Some(root) => root.join("guest"),
        None => out_dir.join("guest"),
    }
}

/// The outermost folder at or above `folder` that has a manifest: its workspace.
fn workspace(folder: &Path) -> PathBuf {
    let outermost = folder.ancestors().filter(|folder| folder.join("Cargo.toml").is_file()).last();
    outermost.unwrap_or(folder).to_path_buf()
}

/// The folders whose names must not get into a module: the driver's workspace, the one that this helper (and so, as
/// a rule, the SDK) comes from, the registry and the tool chain.
fn remapped(folder: &Path) -> Vec<(PathBuf, &'static str)> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    // Of several that match, the last holds.
    let mut all = vec![(workspace(Path::new(env!("CARGO_MANIFEST_DIR"))), "/instar"), (workspace(folder), "/src")];
    let mut tool = |variable: &str, default: &str, name| {
        let set = std::env::var_os(variable).map(PathBuf::from);
        all.extend(set.or_else(|| home.as_ref().map(|home| home.join(default))).map(|folder| (folder, name)));
    };
    tool("CARGO_HOME", ".cargo", "/cargo");
    tool("RUSTUP_HOME", ".rustup", "/rustup");
    all
}
