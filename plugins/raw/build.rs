//! Builds the guest half, which the host half embeds.

fn main() {
    instar_guest_build::GuestModule::new("instar-raw-driver", "driver", "raw-module").build();
}
