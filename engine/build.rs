//! Builds the guest modules that the engine carries itself: core, and each operation, which is a folder `guest/NAME` with the
//! program `src/bin/NAME-module.rs`.

use instar_guest_build::GuestModule;
use std::path::Path;

const GUEST: &str = "../guest";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={GUEST}");
    let folders = std::fs::read_dir(GUEST).map(|entries| entries.flatten().map(|entry| entry.file_name()));
    let Ok(folders) = folders else {
        eprintln!("error: the folder of the guest's crates, {GUEST}, cannot be read");
        std::process::exit(1);
    };
    for name in folders.filter_map(|name| name.into_string().ok()) {
        let binary = format!("{name}-module");
        if Path::new(GUEST).join(&name).join(format!("src/bin/{binary}.rs")).is_file() {
            GuestModule::new(format!("instar-guest-{name}"), format!("{GUEST}/{name}"), binary).build();
        }
    }
}
