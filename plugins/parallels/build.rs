//! Builds the guest half, which the host half embeds.

fn main() {
    instar_guest_build::GuestModule::new("instar-parallels-driver", "driver", "parallels-module").build();
}
