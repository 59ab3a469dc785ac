//! A driver through the tables and back.
#![allow(clippy::unwrap_used)]
extern crate std;

use super::*;
use crate::{BlockIo, FormatDriver, IoFailure, NoSink, NoSource, ReadBelow, Sink, Source};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_abi::{
    ChainConfig, DeviceConfig, Extent, ExtentKind, FormatOps, ImageInfo, OperationConfig, PlanSummary, Request, SinkOps,
};
use std::cell::RefCell;

std::thread_local! {
    static LOG: RefCell<Vec<std::string::String>> = const { RefCell::new(Vec::new()) };
}

fn log(text: impl Into<std::string::String>) {
    LOG.with_borrow_mut(|log| log.push(text.into()));
}

#[derive(Default)]
struct TestIo;

impl BlockIo for TestIo {
    fn submit(&mut self, requests: &mut [Request]) -> Result<(), IoFailure> {
        log(std::format!("submit {}", requests.len()));
        Ok(())
    }
    fn heap_free(&self) -> usize {
        1 << 20
    }
}

struct Driver;
struct TestSource {
    broken: bool,
}
struct TestSink;

const SIZE: u64 = 1 << 20;

fn extent(guest_offset: u64, length: u64, kind: ExtentKind) -> Extent {
    Extent { guest_offset, length, location: 7, kind: kind as u32, device: 0 }
}

impl Source for TestSource {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: SIZE, cluster_size: 512 }
    }
    fn check(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        io.flush(3)?;
        if will_empty {
            Ok(42)
        } else {
            Err(DriverError::new(ErrorCode::OverlayCorrupt, "entry 5 is odd").at(3, 512))
        }
    }
    fn extents(
        &mut self,
        _: &mut dyn BlockIo,
        range: Range<u64>,
        max: usize,
        out: &mut Vec<Extent>,
    ) -> DriverResult<u64> {
        let Range { start: from, end } = range;
        if self.broken {
            out.resize(max + 1, extent(from, 1, ExtentKind::Data));
            return Ok(from);
        }
        let mut at = from;
        while at < end && out.len() < max {
            out.push(extent(at, 512, ExtentKind::Encoded));
            at += 1024;
        }
        Ok(at.min(SIZE))
    }
    fn read(&mut self, _: &mut dyn BlockIo, extent: &Extent, at: u64, buffer: &mut [u8]) -> DriverResult<()> {
        buffer.fill(u8::try_from(extent.location + at - extent.guest_offset).unwrap());
        Ok(())
    }
    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Ok(41)
    }
}

impl Drop for TestSource {
    fn drop(&mut self) {
        log("source closed");
    }
}

impl Sink for TestSink {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: SIZE, cluster_size: 4096 }
    }
    fn plan(&mut self, _: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        log(std::format!("plan {}", extents.len()));
        Ok(())
    }
    fn planned(&mut self, _: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        Ok(PlanSummary { final_length: 9, new_data_clusters: 8, new_metadata_clusters: 7, ..PlanSummary::default() })
    }
    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        let mut buffer = [0; 4];
        below.read(io, 100, &mut buffer)?;
        log(std::format!("write {} over {buffer:?}, ancestors {}", extents.len(), below.exists()));
        Ok(())
    }
    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        io.flush(16)
    }
    fn grow(&mut self, _: &mut dyn BlockIo, virtual_size: u64, below_length: u64) -> DriverResult<()> {
        log(std::format!("grow to {virtual_size} over {below_length}"));
        Ok(())
    }
}

impl FormatDriver for Driver {
    type Source = TestSource;
    type Sink = TestSink;
    fn open_source(_: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<TestSource> {
        Ok(TestSource { broken: device.device == 9 })
    }
    fn open_sink(_: &mut dyn BlockIo, _: &DeviceConfig, has_backing: bool) -> DriverResult<TestSink> {
        log(std::format!("sink opened, backing {has_backing}"));
        Ok(TestSink)
    }
}

struct Below {
    fail: bool,
}

impl ReadBelow for Below {
    fn exists(&self) -> bool {
        true
    }
    fn read(&mut self, io: &mut dyn BlockIo, guest_offset: u64, buffer: &mut [u8]) -> DriverResult<()> {
        if self.fail {
            return Err(DriverError::new(ErrorCode::OverlayIo, "below").at(2, guest_offset));
        }
        io.flush(1)?;
        buffer.fill(0xbb);
        Ok(())
    }
}

static BOTH: FormatOps = FormatTables::<Driver, TestIo>::ops(true, true);

fn format() -> ForeignFormat {
    // SAFETY: a static table.
    unsafe { ForeignFormat::new(&raw const BOTH) }.unwrap()
}

#[test]
fn a_source_works_across_the_border() {
    let mut source = format().open_source(&DeviceConfig::default()).unwrap();
    let io = &mut TestIo;
    assert_eq!(source.info(), ImageInfo { virtual_size: SIZE, cluster_size: 512 });
    assert_eq!(source.check(io, true).unwrap(), 42);
    let error = source.check(io, false).unwrap_err();
    assert_eq!(error, DriverError::new(ErrorCode::OverlayCorrupt, "entry 5 is odd").at(3, 512));
    let mut found = vec![extent(0, 1, ExtentKind::Zero)];
    let mut from = 0;
    while from < SIZE {
        from = source.extents(io, from..SIZE, 100, &mut found).unwrap();
    }
    assert_eq!(found.len(), 1025);
    let mut part = Vec::new();
    assert_eq!(source.extents(io, 2048..4096, 100, &mut part).unwrap(), 4096);
    assert_eq!(part.iter().map(|extent| extent.guest_offset).collect::<Vec<_>>(), [2048, 3072]);
    let mut buffer = [0; 16];
    source.read(io, &found[3], found[3].guest_offset + 5, &mut buffer).unwrap();
    assert_eq!(buffer, [12; 16]);
    let outside = source.read(io, &found[3], found[3].guest_offset + 500, &mut buffer).unwrap_err();
    assert_eq!(outside.code, ErrorCode::GuestProtocol);
    assert_eq!(source.empty(io).unwrap(), 41);
    drop(source);
    assert_eq!(LOG.take().last().unwrap(), "source closed");
}

#[test]
fn a_source_that_breaks_the_interface_is_found_out() {
    let device = DeviceConfig { device: 9, ..DeviceConfig::default() };
    let mut source = format().open_source(&device).unwrap();
    let error = source.extents(&mut TestIo, 0..SIZE, 10, &mut Vec::new()).unwrap_err();
    assert_eq!(error.code, ErrorCode::GuestProtocol);
}

#[test]
fn a_sink_works_across_the_border() {
    LOG.take();
    let mut sink = format().open_sink(&DeviceConfig::default(), true).unwrap();
    let io = &mut TestIo;
    assert_eq!(sink.info().cluster_size, 4096);
    sink.plan(io, &[]).unwrap();
    sink.plan(io, &[extent(0, 5, ExtentKind::Data), extent(9, 5, ExtentKind::Zero)]).unwrap();
    let unknown = Extent { kind: 77, ..extent(0, 5, ExtentKind::Data) };
    assert_eq!(sink.plan(io, &[unknown]).unwrap_err().code, ErrorCode::GuestProtocol);
    assert_eq!(sink.planned(io).unwrap().new_metadata_clusters, 7);
    sink.write(io, &[extent(0, 5, ExtentKind::Data)], &mut Below { fail: false }).unwrap();
    let failed = sink.write(io, &[extent(0, 5, ExtentKind::Data)], &mut Below { fail: true }).unwrap_err();
    assert_eq!(failed, DriverError::new(ErrorCode::OverlayIo, "below").at(2, 100));
    sink.finish(io).unwrap();
    let expected = [
        "sink opened, backing true",
        "plan 0",
        "plan 2",
        "submit 1",
        "write 1 over [187, 187, 187, 187], ancestors true",
        "submit 1",
    ];
    assert_eq!(LOG.take(), expected);
}

#[test]
fn a_sink_grows_across_the_border_unless_its_table_has_no_function_for_it() {
    let io = &mut TestIo;
    let mut sink = format().open_sink(&DeviceConfig::default(), false).unwrap();
    LOG.take();
    sink.grow(io, 3 << 20, 5).unwrap();
    assert_eq!(LOG.take(), ["grow to 3145728 over 5"]);

    let table = |size: usize| {
        let mut ops = super::sink_ops::<Driver, TestIo>();
        (ops.size, ops.grow) = (u32::try_from(size).unwrap(), None);
        FormatOps { source: core::ptr::null(), sink: vec::Vec::leak(vec![ops]).as_ptr() }
    };
    let fixed = table(SinkOps::MIN_SIZE);
    // SAFETY: the tables live for ever.
    let mut sink =
        unsafe { ForeignFormat::new(&raw const fixed) }.unwrap().open_sink(&DeviceConfig::default(), false).unwrap();
    LOG.take();
    assert_eq!(sink.grow(io, 3 << 20, 5).unwrap_err().code, ErrorCode::UnsupportedFormat);
    assert_eq!(LOG.take(), <[&str; 0]>::default());
    sink.plan(io, &[]).unwrap();
    let too_short = table(SinkOps::MIN_SIZE - 1);
    // SAFETY: as above.
    assert!(unsafe { ForeignFormat::new(&raw const too_short) }.is_err());
}

#[test]
fn a_role_that_is_not_offered_is_refused() {
    struct Nothing;
    impl FormatDriver for Nothing {
        type Source = NoSource;
        type Sink = NoSink;
    }
    static NONE: FormatOps = FormatTables::<Nothing, TestIo>::ops(false, false);
    // SAFETY: a static table.
    let format = unsafe { ForeignFormat::new(&raw const NONE) }.unwrap();
    assert!(!format.has_source() && !format.has_sink());
    let device = DeviceConfig::default();
    assert_eq!(format.open_source(&device).map(|_| ()).unwrap_err().code, ErrorCode::UnsupportedFormat);
    assert_eq!(format.open_sink(&device, false).map(|_| ()).unwrap_err().code, ErrorCode::UnsupportedFormat);
}

#[test]
fn an_operation_finds_the_format_of_a_device() {
    let (config, chain) = (OperationConfig::default(), ChainConfig::default());
    let formats = [core::ptr::null(), core::ptr::null(), &raw const BOTH];
    // SAFETY: everything lives until the end of the test.
    let operation = unsafe { Operation::new(&raw const config, &raw const chain, formats.as_ptr(), 3) }.unwrap();
    let device = |module| DeviceConfig { module, ..DeviceConfig::default() };
    assert!(operation.format_of(&device(2)).is_ok());
    assert_eq!(operation.format_of(&device(1)).map(|_| ()).unwrap_err().code, ErrorCode::GuestProtocol);
    assert_eq!(operation.format_of(&device(3)).map(|_| ()).unwrap_err().code, ErrorCode::PluginUnavailable);
}
