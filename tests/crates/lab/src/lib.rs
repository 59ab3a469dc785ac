//! What the tests of the library and of the program share: plugin directories that pass the loader's checks, and images.
//! What goes wrong here fails the test.

#![allow(missing_docs, clippy::new_without_default, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod lab;

use instar::plugins::{Registry, SearchPath};
use instar::sandbox::{Sandbox, SandboxChoice};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Where cargo puts what it builds for tests.
fn built_in() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().to_owned()
}

/// The program, which cargo builds for the integration tests of its crate.
pub fn program() -> PathBuf {
    let path = built_in().parent().unwrap().join("instar");
    assert!(path.is_file(), "{} is not built", path.display());
    path
}

/// The sandbox that the tests use which are not about one: `make test SANDBOX=process` sets it.
pub fn sandbox() -> SandboxChoice {
    let name = std::env::var("INSTAR_TEST_SANDBOX").unwrap_or_default();
    let choice = SandboxChoice::from_name(&name);
    assert!(choice.is_some() || name.is_empty(), "INSTAR_TEST_SANDBOX is no sandbox: {name:?}");
    choice.unwrap_or_default()
}

/// The program with a command, in the tests' sandbox. What this machine is configured to do says nothing.
pub fn instar(command: &str) -> Command {
    let mut instar = Command::new(program());
    instar.env("INSTAR_CONFIG", "").arg(command);
    if !["create", "info", "plugins"].contains(&command) {
        instar.args(["--sandbox", sandbox().name()]);
    }
    instar
}

/// The cdylib that cargo built for a dependency of this crate.
pub fn built(name: &str) -> PathBuf {
    let path = built_in().join(format!("lib{name}.so"));
    assert!(path.is_file(), "{} is not built", path.display());
    path
}

pub fn qcow2_library() -> PathBuf {
    built("instar_plugin_qcow2")
}

pub fn raw_library() -> PathBuf {
    built("instar_plugin_raw")
}

/// A directory of plugins of one's own.
pub struct PluginDir(pub TempDir);

impl PluginDir {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Put `bytes` there as the plugin `name`.
    pub fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path().join(format!("libinstar_plugin_{name}.so"));
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        path
    }

    pub fn copy(&self, name: &str, library: &Path) -> PathBuf {
        self.put(name, &std::fs::read(library).unwrap())
    }

    pub fn load(&self) -> Registry {
        Registry::load(&SearchPath::of(vec![self.path().to_owned()]))
    }

    /// The one reason for which the one library there is skipped.
    pub fn reason(&self) -> String {
        let registry = self.load();
        assert!(registry.plugins().is_empty(), "{:?}", registry.plugins());
        assert_eq!(registry.skipped().len(), 1, "{:?}", registry.skipped());
        let reason = registry.skipped()[0].reason.clone();
        assert!(!reason.contains('\n') && reason.len() < 400, "{reason:?}");
        reason
    }
}

pub fn qcow2_registry() -> (PluginDir, Registry) {
    let dir = PluginDir::new();
    dir.copy("qcow2", &qcow2_library());
    let registry = dir.load();
    assert_eq!(registry.plugins().len(), 1, "{:?}", registry.skipped());
    (dir, registry)
}

/// The bundled plugins.
pub fn boxed_registry() -> (PluginDir, Registry) {
    let dir = PluginDir::new();
    dir.copy("qcow2", &qcow2_library());
    dir.copy("raw", &raw_library());
    let registry = dir.load();
    assert_eq!(registry.plugins().len(), 2, "{:?}", registry.skipped());
    (dir, registry)
}
