//! The example of a driver's test in `docs/plugins.md`.

use instar_guest_sdk::abi::DeviceConfig;
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{DriverResult, Extent, Extents, FormatDriver, Source};
use instar_raw_driver::Raw;

#[test]
fn looking_changes_nothing() -> DriverResult<()> {
    let mut io = MemoryDevices::new([(0, vec![7; 1024])]);
    let device = DeviceConfig { file_length: 1024, virtual_size: 1024, ..DeviceConfig::default() };
    let mut source = Raw::open_source(&mut io, &device)?;
    let mut extents = Extents::with_room_for(16);
    assert_eq!(source.extents(&mut io, 0..1024, &mut extents)?, 1024);
    assert_eq!(*extents, [Extent::data(0, 1024, 0, 0)]);
    assert!(io.log.is_empty());
    Ok(())
}
