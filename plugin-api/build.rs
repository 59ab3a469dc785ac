//! Hands the crate a hash of its own sources and of the compiler, from which its types follow (see `src/origin.rs`).

#[path = "src/fnv.rs"]
mod fnv;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=src");
    let variable = |name| env::var_os(name).ok_or(format!("cargo does not set {name}"));
    let directory = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("src");
    let mut files: Vec<PathBuf> = fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    files.sort();
    let mut hash = fnv::START;
    for file in files {
        // A directory would be sources that are left out: this fails.
        let bytes = fs::read(&file)?;
        let name = file.file_name().unwrap_or_default().as_encoded_bytes();
        for part in [name, bytes.as_slice()] {
            hash = fnv::take_in(hash, &(part.len() as u64).to_le_bytes());
            hash = fnv::take_in(hash, part);
        }
    }
    let compiler = Command::new(variable("RUSTC")?).arg("-vV").output()?;
    hash = fnv::take_in(hash, &compiler.stdout);
    println!("cargo:rustc-env=INSTAR_CONTRACT_SOURCES={hash:016x}");
    Ok(())
}
