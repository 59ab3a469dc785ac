//! What a descriptor says of a parent, and disks of which only the descriptor is looked at.

use instar_guest_sdk::abi::{device_flags, DeviceConfig, FileDevice, FileList, ImageId, ImageInfo};
use instar_guest_sdk::conformance::{source_of, ImageKit, ParentKit, Recorded};
use instar_guest_sdk::{BlockIo, DriverError, DriverResult, Parent, Sink, Source};
use instar_vmdk_driver::Vmdk;

/// What the text of a descriptor says of the parent. Of a line that is torn or stands twice, all of it.
pub fn recorded(text: &str) -> Option<Recorded> {
    let values = |key: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.split_once('='));
        lines.filter(|(found, _)| found.trim() == key).map(|(_, value)| value.trim().to_owned()).collect()
    };
    let (ids, names) = (values("parentCID"), values("parentFileNameHint"));
    let [id] = <[String; 1]>::try_from(ids).ok()?;
    let id = u32::from_str_radix(&id, 16).ok().filter(|id| *id != u32::MAX)?;
    let names = names.into_iter().map(|name| name.trim_matches('"').to_owned().into_bytes()).collect();
    Some(Recorded { names, format: None, identity: ImageId::new(&id.to_be_bytes()) })
}

/// What an image records of this parent.
pub fn expected(parent: &Parent<'_>) -> Recorded {
    Recorded { names: vec![parent.name.to_vec()], format: None, identity: parent.identity }
}

/// A disk in several files, as far as the one with the descriptor goes. Its extent is a flat one of this many bytes.
pub struct DescriptorKit(pub u64);

impl DescriptorKit {
    /// The text of an image: up to the first zero byte.
    fn text(image: &[u8]) -> String {
        String::from_utf8_lossy(image.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
    }
}

impl ImageKit for DescriptorKit {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        let flags = device.flags | device_flags::PRESENT;
        let extent = FileDevice { flags, device: device.device + 1, file_length: self.0, max_length: self.0 };
        let files = FileList::of(Box::leak(Box::new([extent])));
        source_of::<Vmdk>(io, &DeviceConfig { files, cluster_size: 0, ..*device })
    }

    fn open_sink(&self, _: &mut dyn BlockIo, device: &DeviceConfig, _: bool) -> DriverResult<Box<dyn Sink>> {
        Err(DriverError::new(instar_guest_sdk::abi::ErrorCode::UnsupportedFormat, "no sink").at(device.device, 0))
    }

    fn info(&self, _: &[u8]) -> ImageInfo {
        ImageInfo { virtual_size: self.0, cluster_size: 1 }
    }

    /// Every line of the descriptor but those about the parent, with its end.
    fn content(&self, image: &[u8], _: Option<&[u8]>) -> Vec<u8> {
        let text = Self::text(image);
        let is_parent = |line: &&str| line.starts_with("parentCID") || line.starts_with("parentFileNameHint");
        text.split_inclusive('\n').filter(|line| !is_parent(line)).collect::<String>().into_bytes()
    }
}

impl ParentKit for DescriptorKit {
    fn recorded(&self, image: &[u8]) -> Option<Recorded> {
        recorded(&Self::text(image))
    }

    fn expected(&self, parent: &Parent<'_>) -> Recorded {
        expected(parent)
    }
}
