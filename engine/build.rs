//! Builds the guest modules that the engine carries itself: core and the operations.

use instar_guest_build::GuestModule;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    GuestModule::new("instar-guest-core", "../guest/core", "core-module").build();
    GuestModule::new("instar-guest-commit", "../guest/commit", "commit-module").build();
    GuestModule::new("instar-guest-check", "../guest/check", "check-module").build();
    GuestModule::new("instar-guest-map", "../guest/map", "map-module").build();
}
