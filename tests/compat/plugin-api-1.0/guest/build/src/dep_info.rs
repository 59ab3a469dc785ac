//! Which files a guest binary was made of: the `.d` file that cargo writes beside it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The dependencies named in the text of a `.d` file (`target: a b\ c`).
pub fn parse(text: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in text.lines() {
        let Some((_, dependencies)) = line.split_once(": ") else { continue };
        let mut name = String::new();
        let mut characters = dependencies.chars();
        while let Some(character) = characters.next() {
            match character {
                '\\' => name.extend(characters.next()),
                ' ' if !name.is_empty() => files.push(PathBuf::from(std::mem::take(&mut name))),
                ' ' => {}
                other => name.push(other),
            }
        }
        if !name.is_empty() {
            files.push(PathBuf::from(name));
        }
    }
    files
}

/// `sources` and the manifests above each of them that decide how they are built: the nearest `Cargo.toml`, and
/// every `Cargo.toml` and `Cargo.lock` further up.
pub fn with_manifests(sources: &[PathBuf]) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    let mut seen = BTreeSet::new();
    for source in sources {
        all.insert(source.clone());
        for folder in source.ancestors().skip(1) {
            if !seen.insert(folder.to_path_buf()) {
                break;
            }
            add_if_there(&mut all, &folder.join("Cargo.toml"));
            add_if_there(&mut all, &folder.join("Cargo.lock"));
        }
    }
    all
}

fn add_if_there(all: &mut BTreeSet<PathBuf>, file: &Path) {
    if file.is_file() {
        all.insert(file.to_path_buf());
    }
}
