//! Builds the guest half, which the host half embeds.

fn main() {
    instar_guest_build::GuestModule::new("instar-qcow2-driver", "driver", "qcow2-module").build();
}
