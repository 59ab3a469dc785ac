//! Images of the testkit, opened, for the unit tests of the parts.

use crate::image::{Image, Role};
use instar_guest_sdk::abi::{Phase, DEVICE_OUTPUT};
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::BlockIo;
use instar_qcow2_testkit::builder::{build, Spec};
use instar_qcow2_testkit::config;

/// An image that is built, as a target that may be changed.
#[allow(clippy::unwrap_used, reason = "an image that cannot be opened is a test that fails")]
pub(crate) fn open(spec: &Spec) -> (MemoryDevices, Image) {
    let mut io = MemoryDevices::new([(DEVICE_OUTPUT, build(spec))]);
    let config = config(&io, DEVICE_OUTPUT);
    let image = Image::open(&mut io, &config, Role::Sink).unwrap();
    io.enter(Phase::Target);
    (io, image)
}
