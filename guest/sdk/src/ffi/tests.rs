//! A driver through the tables and back.
#![allow(clippy::unwrap_used)]
extern crate std;

use super::*;
use crate::{
    BlockIo, Content, Extent, Extents, FormatDriver, IoFailure, NoSink, NoSource, Parent, ReadBelow, Sink, Source,
};
use alloc::borrow::ToOwned;
use alloc::vec::Vec;
use core::ops::Range;
use instar_guest_abi::{
    CallTable, ChainConfig, DeviceConfig, FindingKind, FormatOps, ImageId, ImageInfo, OperationConfig, PlanSummary,
    Repair, RepairSummary, Request, SinkOps, SourceOps, WireExtent, WireParent,
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
struct TestSource;
struct TestSink;

const SIZE: u64 = 1 << 20;

impl Source for TestSource {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: SIZE, cluster_size: 512 }
    }
    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        io.flush(3)?;
        if will_empty {
            Ok(42)
        } else {
            Err(DriverError::new(ErrorCode::OverlayCorrupt, "entry 5 is odd").at(3, 512))
        }
    }
    fn extents(&mut self, _: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let Range { start: mut at, end } = range;
        while at < end && out.push(Extent::encoded(at, 512, 7)) {
            at += 1024;
        }
        Ok(at.min(SIZE))
    }
    fn read(&mut self, _: &mut dyn BlockIo, extent: &Extent, at: u64, buffer: &mut [u8]) -> DriverResult<()> {
        let Content::Encoded { location } = extent.content else { unreachable!("{extent:?}") };
        buffer.fill(u8::try_from(location + at - extent.guest_offset).unwrap());
        Ok(())
    }
    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Ok(41)
    }
    fn plan_parent(&mut self, _: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<()> {
        log(std::format!("parent {parent:?}"));
        Ok(())
    }
    fn set_parent(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        io.flush(3)
    }
    fn plan_repair(
        &mut self,
        _: &mut dyn BlockIo,
        repair: Repair,
        finding: &mut dyn FnMut(FindingKind, &str),
    ) -> DriverResult<RepairSummary> {
        finding(FindingKind::Corruption, "cluster 9 would be lost");
        Ok(RepairSummary { corruptions: repair as u64, leaks: 5, final_length: 6 })
    }
    fn repair(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        io.flush(4)
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
    fn shrink(&mut self, _: &mut dyn BlockIo, virtual_size: u64) -> DriverResult<()> {
        log(std::format!("shrink to {virtual_size}"));
        Ok(())
    }
}

impl FormatDriver for Driver {
    type Source = TestSource;
    type Sink = TestSink;
    fn open_source(_: &mut dyn BlockIo, _: &DeviceConfig) -> DriverResult<TestSource> {
        Ok(TestSource)
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
    assert_eq!(source.verify(io, true).unwrap(), 42);
    let error = source.verify(io, false).unwrap_err();
    assert_eq!(error, DriverError::new(ErrorCode::OverlayCorrupt, "entry 5 is odd").at(3, 512));
    let mut found = Vec::new();
    let mut from = 0;
    while from < SIZE {
        let mut some = Extents::with_room_for(100);
        from = source.extents(io, from..SIZE, &mut some).unwrap();
        assert_eq!(some.len(), 100.min(1024 - found.len()));
        found.extend_from_slice(&some);
    }
    assert_eq!(found.len(), 1024);
    let mut part = Extents::with_room_for(100);
    assert_eq!(source.extents(io, 2048..4096, &mut part).unwrap(), 4096);
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
fn an_image_is_repaired_and_gets_another_parent_across_the_border() {
    let mut source = format().open_source(&DeviceConfig::default()).unwrap();
    let (io, mut found) = (&mut TestIo, Vec::new());
    let planned = source.plan_repair(io, Repair::All, &mut |kind, text| found.push((kind, text.to_owned()))).unwrap();
    assert_eq!(planned, RepairSummary { corruptions: 2, leaks: 5, final_length: 6 });
    assert_eq!(found, [(FindingKind::Corruption, "cluster 9 would be lost".to_owned())]);
    LOG.take();
    source.repair(io).unwrap();
    let parent = Parent { name: b"b\xff", format: "vmdk", identity: ImageId::new(&[7]), virtual_size: 3 };
    source.plan_parent(io, Some(&parent)).unwrap();
    source.plan_parent(io, None).unwrap();
    source.set_parent(io).unwrap();
    assert_eq!(LOG.take(), ["submit 1", &std::format!("parent {:?}", Some(parent)), "parent None", "submit 1"]);

    let none = WireParent { name: core::ptr::null(), ..super::wire::parent_to_wire(&parent) };
    let table = super::source_ops::<Driver, TestIo>();
    let (device, mut handle) = (DeviceConfig::default(), core::ptr::null_mut());
    call(|failure| (table.open)(&raw const device, &raw mut handle, failure)).unwrap();
    let plan = table.plan_parent.unwrap();
    let error = call(|failure| plan(handle, &raw const none, failure)).unwrap_err();
    assert_eq!(error.code, ErrorCode::GuestProtocol);
    (table.close)(handle);
}

#[test]
fn what_a_table_has_no_function_for_is_not_implemented() {
    let good = super::source_ops::<Driver, TestIo>();
    let table = SourceOps { check: None, plan_parent: None, set_parent: None, plan_repair: None, repair: None, ..good };
    let ops = FormatOps { source: &raw const table, sink: core::ptr::null() };
    // SAFETY: the tables live until the end of the test.
    let format = unsafe { ForeignFormat::new(&raw const ops) }.unwrap();
    let (mut source, io) = (format.open_source(&DeviceConfig::default()).unwrap(), &mut TestIo);
    let refusals = [
        source.check(io, &mut |_, _| ()).unwrap_err(),
        source.plan_repair(io, Repair::Leaks, &mut |_, _| ()).unwrap_err(),
        source.repair(io).unwrap_err(),
        source.plan_parent(io, None).unwrap_err(),
        source.set_parent(io).unwrap_err(),
    ];
    assert!(refusals.iter().all(|error| error.code == ErrorCode::NotImplemented));
}

#[test]
fn a_source_that_breaks_the_interface_is_found_out() {
    /// What the module writes: the number of extents, and one of this kind.
    const ANSWERS: [(usize, u32, &str); 3] = [
        (1, 77, "extent 0 of 1 from guest byte 0 on is of kind 77, which no source has"),
        (1, 4, "extent 0 of 1 from guest byte 0 on is of kind 4, which no source has"),
        (11, 1, "it returned 11 extents, and was asked for 10"),
    ];
    extern "C" fn extents<const ANSWER: usize>(
        _: *mut core::ffi::c_void,
        _: u64,
        _: u64,
        out: *mut WireExtent,
        capacity: usize,
        count: *mut usize,
        next: *mut u64,
        _: *mut Failure,
    ) -> u32 {
        assert!(capacity >= 1);
        let (found, kind, _) = ANSWERS[ANSWER];
        // SAFETY: the caller passes room for one at least, and writable results.
        unsafe {
            out.write(WireExtent { length: 1, kind, ..WireExtent::default() });
            count.write(found);
            next.write(SIZE);
        }
        0
    }
    let good = super::source_ops::<Driver, TestIo>();
    let tables = [
        SourceOps { extents: extents::<0>, ..good },
        SourceOps { extents: extents::<1>, ..good },
        SourceOps { extents: extents::<2>, ..good },
    ];
    for (table, (_, _, why)) in tables.iter().zip(ANSWERS) {
        let ops = FormatOps { source: table, sink: core::ptr::null() };
        let device = DeviceConfig { device: 9, ..DeviceConfig::default() };
        // SAFETY: the tables live until the end of the test.
        let mut source = unsafe { ForeignFormat::new(&raw const ops) }.unwrap().open_source(&device).unwrap();
        let error = source.extents(&mut TestIo, 0..SIZE, &mut Extents::with_room_for(10)).unwrap_err();
        let expected = std::format!("its driver broke the interface: {why}");
        assert_eq!((error.code, error.device, error.text), (ErrorCode::GuestProtocol, Some(9), expected));
    }
}

#[test]
fn a_sink_is_not_shown_what_is_no_extent() {
    let table = super::sink_ops::<Driver, TestIo>();
    let (device, mut handle) = (DeviceConfig::default(), core::ptr::null_mut());
    call(|failure| (table.open)(&raw const device, 1, &raw mut handle, failure)).unwrap();
    LOG.take();
    let good = WireExtent { length: 5, kind: 2, ..WireExtent::default() };
    let bad = [
        (WireExtent { kind: 77, ..good }, "extent 1 of 2 is of the unknown kind 77"),
        (WireExtent { length: 0, guest_offset: 9, ..good }, "extent 1 of 2 is 0 bytes long at guest byte 9"),
    ];
    for (record, why) in bad {
        let records = [good, record];
        let error = call(|failure| (table.plan)(handle, records.as_ptr(), 2, failure)).unwrap_err();
        assert_eq!((error.code, error.text.as_str()), (ErrorCode::GuestProtocol, why));
    }
    (table.close)(handle);
    assert_eq!(LOG.take(), <[&str; 0]>::default());
}

#[test]
fn a_sink_works_across_the_border() {
    LOG.take();
    let mut sink = format().open_sink(&DeviceConfig::default(), true).unwrap();
    let io = &mut TestIo;
    assert_eq!(sink.info().cluster_size, 4096);
    sink.plan(io, &[]).unwrap();
    sink.plan(io, &[Extent::data(0, 5, 0, 7), Extent::zero(9, 5)]).unwrap();
    assert_eq!(sink.planned(io).unwrap().new_metadata_clusters, 7);
    sink.write(io, &[Extent::data(0, 5, 0, 7)], &mut Below { fail: false }).unwrap();
    let failed = sink.write(io, &[Extent::data(0, 5, 0, 7)], &mut Below { fail: true }).unwrap_err();
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
    sink.shrink(io, 1 << 20).unwrap();
    assert_eq!(LOG.take(), ["grow to 3145728 over 5", "shrink to 1048576"]);

    let ops = |size: usize| {
        let mut ops = super::sink_ops::<Driver, TestIo>();
        (ops.size, ops.grow, ops.shrink) = (u32::try_from(size).unwrap(), None, None);
        ops
    };
    let table = |ops: &SinkOps| FormatOps { source: core::ptr::null(), sink: core::ptr::from_ref(ops) };
    let old = ops(SinkOps::MIN_SIZE);
    let fixed = table(&old);
    // SAFETY: the tables live until the end of this test, and nothing that is made of them longer.
    let mut sink =
        unsafe { ForeignFormat::new(&raw const fixed) }.unwrap().open_sink(&DeviceConfig::default(), false).unwrap();
    LOG.take();
    assert_eq!(sink.grow(io, 3 << 20, 5).unwrap_err().code, ErrorCode::UnsupportedFormat);
    assert_eq!(sink.shrink(io, 1 << 20).unwrap_err().code, ErrorCode::UnsupportedFormat);
    assert_eq!(LOG.take(), <[&str; 0]>::default());
    sink.plan(io, &[]).unwrap();
    let short = ops(SinkOps::MIN_SIZE - 1);
    let too_short = table(&short);
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

/// A table as a later minor version has it: with one more function that may be null.
#[repr(C)]
#[derive(Clone, Copy)]
struct Later<T> {
    today: T,
    more: Option<extern "C" fn() -> u32>,
}

extern "C" fn more() -> u32 {
    7
}

#[test]
fn a_module_that_offers_more_than_is_known_works() {
    let mut source = Later { today: super::source_ops::<Driver, TestIo>(), more: Some(more) };
    source.today.size = u32::try_from(size_of_val(&source)).unwrap();
    let mut sink = Later { today: super::sink_ops::<Driver, TestIo>(), more: Some(more) };
    sink.today.size = u32::try_from(size_of_val(&sink)).unwrap();
    let ops = FormatOps { source: (&raw const source).cast(), sink: (&raw const sink).cast() };
    // SAFETY: the tables live until the end of the test, and are as long as they say.
    let format = unsafe { ForeignFormat::new(&raw const ops) }.unwrap();
    let device = DeviceConfig::default();
    assert_eq!(format.open_source(&device).unwrap().verify(&mut TestIo, true).unwrap(), 42);
    let mut sink = format.open_sink(&device, false).unwrap();
    assert_eq!(sink.planned(&mut TestIo).unwrap().final_length, 9);
    assert_eq!(sink.next_identity(None), None);
}

#[test]
fn whoever_knows_more_sees_that_a_module_of_today_lacks_it() {
    let (source, sink) = (super::source_ops::<Driver, TestIo>(), super::sink_ops::<Driver, TestIo>());
    // SAFETY: the tables are as long as they say, and the function that they lack may be null.
    let (later_source, later_sink): (Later<SourceOps>, Later<SinkOps>) = unsafe {
        (
            foreign_format::copy((&raw const source).cast(), source.size as usize),
            foreign_format::copy((&raw const sink).cast(), sink.size as usize),
        )
    };
    assert!(later_source.more.is_none() && later_sink.more.is_none());
    assert!(later_source.today.repair.is_some() && later_sink.today.next_identity.is_some());
    let longer = Later { today: source, more: Some(more) };
    // SAFETY: as above.
    let seen: Later<SourceOps> = unsafe { foreign_format::copy(&raw const longer, size_of_val(&longer)) };
    assert_eq!(seen.more.map(|more| more()), Some(7));
}

#[test]
fn what_is_appended_leaves_the_least_sizes_as_they_are() {
    // Numbers, because older modules and cores have them compiled in.
    assert_eq!((SourceOps::MIN_SIZE, SinkOps::MIN_SIZE, CallTable::MIN_SIZE), (136, 112, 88));
}
