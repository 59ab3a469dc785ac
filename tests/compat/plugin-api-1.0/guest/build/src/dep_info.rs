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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_with_spaces_and_several_lines() {
        let text = "/t/a.d: /s/x.rs /s/with\\ space.rs\n\n/t/b: /s/y.rs\n/s/x.rs:\n";
        let expected: Vec<PathBuf> = ["/s/x.rs", "/s/with space.rs", "/s/y.rs"].iter().map(PathBuf::from).collect();
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn manifests_of_a_source_are_found() {
        let root = tempfile::tempdir().unwrap();
        let source = root.path().join("pkg/src/lib.rs");
        std::fs::create_dir_all(source.parent().unwrap()).unwrap();
        for file in ["pkg/src/lib.rs", "pkg/Cargo.toml", "Cargo.toml", "Cargo.lock"] {
            std::fs::write(root.path().join(file), "").unwrap();
        }
        let all = with_manifests(std::slice::from_ref(&source));
        for file in ["pkg/src/lib.rs", "pkg/Cargo.toml", "Cargo.toml", "Cargo.lock"] {
            assert!(all.contains(&root.path().join(file)), "{file}");
        }
    }
}
