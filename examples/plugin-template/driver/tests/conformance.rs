//! Whether the driver keeps what it promises.
//!
//! Say how an image is made and what it reads as, without the driver's code; then remove `#[ignore]`.

use instar_guest_sdk::abi::{DeviceConfig, ImageInfo};
use instar_guest_sdk::conformance::{sink_of, source_of, verify_drawn, Builder, ImageKit, Layer};
use instar_guest_sdk::crash::Crashes;
use instar_guest_sdk::{BlockIo, DriverResult, Sink, Source};
use {{format}}_driver::Format;

struct Kit;

impl ImageKit for Kit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        source_of::<Format>(io, device)
    }

    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        sink_of::<Format>(io, device, has_backing)
    }

    fn info(&self, _image: &[u8]) -> ImageInfo {
        todo!("virtual size and cluster size, as `facts` says them")
    }

    fn content(&self, _image: &[u8], _below: Option<&[u8]>) -> Vec<u8> {
        todo!("what a guest reads, over the bytes that are below")
    }
}

impl Builder for Kit {
    fn cluster(&self) -> u64 {
        65536
    }

    fn build(&self, _layer: &Layer) -> Vec<u8> {
        todo!("an image that holds this")
    }
}

#[test]
#[ignore = "images can be neither made nor read yet"]
fn it_conforms() {
    verify_drawn(&Kit, 0..4, Crashes { drawn: 1, seed: 1 });
}
