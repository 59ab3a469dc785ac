//! Builds the guest modules that the engine carries itself: core for each sandbox, and each operation. A module NAME is the program
//! `src/bin/NAME-module.rs` of a crate in a folder of `guest/`.

use instar_guest_build::GuestModule;
use std::ffi::OsString;
use std::path::Path;

const GUEST: &str = "../guest";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={GUEST}");
    let Some(folders) = entries(Path::new(GUEST)) else {
        eprintln!("error: the folder of the guest's crates, {GUEST}, cannot be read");
        std::process::exit(1);
    };
    for folder in folders.filter_map(|name| name.into_string().ok()) {
        let programs = entries(&Path::new(GUEST).join(&folder).join("src/bin")).into_iter().flatten();
        let programs = programs.filter_map(|name| name.to_str()?.strip_suffix(".rs").map(str::to_owned));
        for program in programs.filter(|program| program.ends_with("-module")) {
            GuestModule::new(format!("instar-guest-{folder}"), format!("{GUEST}/{folder}"), program).build();
        }
    }
}

/// The names in a folder, if it is one.
fn entries(folder: &Path) -> Option<impl Iterator<Item = OsString>> {
    Some(std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.file_name()))
}
