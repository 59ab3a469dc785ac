//! Whose code the program, the plugins and the guest modules hold, and under which terms: the crates they are linked from,
//! with the licence texts that those carry.

use crate::Result;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// The crates whose code is shipped, besides the guest modules of the engine: build scripts build those, which cargo's graph
/// does not show.
const SHIPPED: &[&str] = &[
    "instar-cli",
    "instar-parallels-driver",
    "instar-plugin-parallels",
    "instar-plugin-qcow",
    "instar-plugin-qcow2",
    "instar-plugin-raw",
    "instar-plugin-vdi",
    "instar-plugin-vhdx",
    "instar-plugin-vmdk",
    "instar-plugin-vpc",
    "instar-qcow-driver",
    "instar-qcow2-driver",
    "instar-raw-driver",
    "instar-vdi-driver",
    "instar-vhd-driver",
    "instar-vhdx-driver",
    "instar-vmdk-driver",
];
const INTRODUCTION: &str = "\
instar is linked from the crates below, and from the Rust standard library (MIT OR Apache-2.0). Each is used unmodified.
Of a choice of licences that includes Apache-2.0 or MIT, that one is taken.
";
/// Beginnings of the names of files with terms.
const FILES: &[&str] = &["LICEN", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];

/// The text.
///
/// # Errors
/// When `cargo metadata` fails, or a crate names no licence.
pub fn collect(root: &Path) -> Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root)
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .output()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim_end()));
    }
    let metadata: Value = serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata: {error}"))?;
    let packages: BTreeMap<&str, &Value> =
        array(&metadata["packages"]).filter_map(|package| Some((package["id"].as_str()?, package))).collect();
    let nodes: BTreeMap<&str, &Value> =
        array(&metadata["resolve"]["nodes"]).filter_map(|node| Some((node["id"].as_str()?, node))).collect();

    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut list = BTreeSet::new();
    for package in linked(&packages, &nodes).into_iter().filter_map(|id| packages.get(id)) {
        // A crate without a source is of this workspace.
        if package["source"].is_null() {
            continue;
        }
        let name = format!("{} {}", text(&package["name"]), text(&package["version"]));
        let licence = package["license"].as_str().ok_or_else(|| format!("{name}: no licence is named"))?;
        list.insert(format!("{name}: {licence}"));
        let folder = Path::new(text(&package["manifest_path"])).parent().unwrap_or(root);
        for terms in terms(folder)? {
            texts.entry(terms).or_default().insert(name.clone());
        }
    }
    Ok(render(&list, &texts))
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The packages that are linked into what is shipped: neither build dependencies nor what runs in the compiler.
fn linked<'a>(packages: &BTreeMap<&'a str, &'a Value>, nodes: &BTreeMap<&'a str, &'a Value>) -> BTreeSet<&'a str> {
    let is_module = |package: &Value| {
        let mut targets = array(&package["targets"]).filter(|target| array(&target["kind"]).any(|kind| kind == "bin"));
        text(&package["name"]).starts_with("instar-guest-")
            && targets.any(|target| text(&target["name"]).ends_with("-module"))
    };
    let shipped = |package: &Value| {
        package["source"].is_null() && (SHIPPED.contains(&text(&package["name"])) || is_module(package))
    };
    let mut open: Vec<&str> = packages.iter().filter(|(_, package)| shipped(package)).map(|(id, _)| *id).collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        let Some(package) = packages.get(id) else { continue };
        let macros = array(&package["targets"]).any(|target| array(&target["kind"]).any(|kind| kind == "proc-macro"));
        if macros || !seen.insert(id) {
            continue;
        }
        for dependency in nodes.get(id).into_iter().flat_map(|node| array(&node["deps"])) {
            if array(&dependency["dep_kinds"]).any(|kind| kind["kind"].is_null()) {
                open.extend(dependency["pkg"].as_str());
            }
        }
    }
    seen
}

/// The texts of the files with terms, in a crate's folder and in those below it (bundled C code).
fn terms(folder: &Path) -> Result<Vec<String>> {
    let unreadable = |error| format!("{}: {error}", folder.display());
    let mut found = Vec::new();
    for entry in folder.read_dir().map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        if path.is_dir() {
            found.extend(terms(&path)?);
        } else if FILES.iter().any(|start| name.starts_with(start)) {
            let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            found.push(String::from_utf8_lossy(&bytes).replace('\r', "").trim().to_owned());
        }
    }
    Ok(found)
}

fn render(list: &BTreeSet<String>, texts: &BTreeMap<String, BTreeSet<String>>) -> String {
    let mut out = format!("{INTRODUCTION}\n");
    for line in list {
        // Writing into a string cannot fail.
        let _ = writeln!(out, "    {line}");
    }
    for (terms, crates) in texts {
        let crates = crates.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        let _ = writeln!(out, "\n{}\n{}\n\n{terms}", "-".repeat(78), textwrap::fill(&crates, 78));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_linked_is_named_and_what_only_builds_is_not() {
        let text = collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap_or_else(|error| error);
        for linked in [
            "    abi_stable 0.11",
            "    zstd-sys 2.",
            "    talc 4.",
            "    kvm-ioctls 0.",
            "Copyright (c) Meta Platforms",
        ] {
            assert!(text.contains(linked), "{linked}\n{text}");
        }
        for other in ["    cc 1.", "    proptest", "    syn ", "    clap_mangen", "    instar"] {
            assert!(!text.contains(other), "{other}");
        }
    }
}
