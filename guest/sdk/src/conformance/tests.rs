//! The harness with a driver that keeps its promises, and with drivers that break one each.
#![allow(clippy::unwrap_used)]
extern crate std;

use super::*;
use crate::{BlockIo, DriverError, DriverResult, Extent, Extents, ReadBelow, Sink, Source};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use instar_guest_abi::{DeviceConfig, ErrorCode, ImageInfo, PlanSummary, Request, RequestOp};
use std::panic::{catch_unwind, AssertUnwindSafe};

const CRASHES: Crashes = Crashes { drawn: 1, seed: 1 };

#[test]
fn a_driver_that_keeps_its_promises_conforms() {
    let report = verify_drawn(&Sectors, 0..12, CRASHES);
    assert!(report.committed > 9 && report.states > 100, "{report:?}");
    // A backing that is too small, and cannot grow.
    assert!(report.refused > 0, "{report:?}");
}

/// What a driver does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// It takes one byte of an encoded extent for another.
    Decodes,
    /// It leaves out the extent that begins the disk.
    Omits,
    /// It goes on one sector too far.
    Skips,
    /// It changes its image while it plans.
    PlansLate,
    /// It refuses only when it has written something.
    RefusesLate,
    /// It drops the map before it writes the new one.
    Clobbers,
    /// It reports an image as emptied, and has not flushed that.
    EmptiesLoosely,
    /// It empties nothing.
    Keeps,
}

/// The sectors' driver, with a fault.
struct Faulty(Fault);

struct Wrong<T>(Box<T>, Fault)
where
    T: ?Sized;

/// Leaves flushes out.
struct WithoutFlush<'a>(&'a mut dyn BlockIo);

impl BlockIo for WithoutFlush<'_> {
    fn submit(&mut self, requests: &mut [Request]) -> Result<(), crate::IoFailure> {
        let mut others: Vec<Request> =
            requests.iter().filter(|request| request.op != RequestOp::Flush as u32).copied().collect();
        self.0.submit(&mut others)
    }
    fn heap_free(&self) -> usize {
        self.0.heap_free()
    }
}

impl Source for Wrong<dyn Source> {
    fn info(&self) -> ImageInfo {
        self.0.info()
    }
    fn verify(&mut self, io: &mut dyn BlockIo, will_empty: bool) -> DriverResult<u64> {
        self.0.verify(io, will_empty)
    }
    fn extents(&mut self, io: &mut dyn BlockIo, range: Range<u64>, out: &mut Extents) -> DriverResult<u64> {
        let start = range.start;
        let mut found = Extents::with_room_for(out.room());
        let next = self.0.extents(io, range, &mut found)?;
        for extent in found.iter().filter(|extent| self.1 != Fault::Omits || extent.guest_offset > 0) {
            assert!(out.push(*extent));
        }
        let too_far = self.1 == Fault::Skips && start == 0 && next + SECTOR < self.info().virtual_size;
        Ok(if too_far { next + SECTOR } else { next })
    }
    fn read(&mut self, io: &mut dyn BlockIo, extent: &Extent, at: u64, buffer: &mut [u8]) -> DriverResult<()> {
        self.0.read(io, extent, at, buffer)?;
        if self.1 == Fault::Decodes {
            buffer.iter_mut().take(1).for_each(|byte| *byte ^= 1);
        }
        Ok(())
    }
    fn empty(&mut self, io: &mut dyn BlockIo) -> DriverResult<u64> {
        match self.1 {
            Fault::EmptiesLoosely => self.0.empty(&mut WithoutFlush(io)),
            Fault::Keeps => self.0.verify(io, true),
            _ => self.0.empty(io),
        }
    }
}

impl Sink for Wrong<dyn Sink> {
    fn info(&self) -> ImageInfo {
        self.0.info()
    }
    fn plan(&mut self, io: &mut dyn BlockIo, extents: &[Extent]) -> DriverResult<()> {
        if self.1 == Fault::PlansLate {
            io.write(DEVICE_OUTPUT, 0, &[0])?;
        }
        if self.1 == Fault::RefusesLate {
            return Ok(());
        }
        self.0.plan(io, extents)
    }
    fn planned(&mut self, io: &mut dyn BlockIo) -> DriverResult<PlanSummary> {
        self.0.planned(io)
    }
    fn write(&mut self, io: &mut dyn BlockIo, extents: &[Extent], below: &mut dyn ReadBelow) -> DriverResult<()> {
        match self.1 {
            Fault::RefusesLate => Err(DriverError::new(ErrorCode::UnsupportedFormat, "not now")),
            Fault::Clobbers => {
                io.run(&mut [Request::zero(DEVICE_OUTPUT, 0, SECTOR)])?;
                self.0.write(io, extents, below)
            }
            _ => self.0.write(io, extents, below),
        }
    }
    fn finish(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        self.0.finish(io)
    }
}

impl ImageKit for Faulty {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        Ok(Box::new(Wrong::<dyn Source>(Sectors.open_source(io, device)?, self.0)))
    }
    fn open_sink(&self, io: &mut dyn BlockIo, device: &DeviceConfig, has_backing: bool) -> DriverResult<Box<dyn Sink>> {
        Ok(Box::new(Wrong::<dyn Sink>(Sectors.open_sink(io, device, has_backing)?, self.0)))
    }
    fn info(&self, image: &[u8]) -> ImageInfo {
        Sectors.info(image)
    }
    fn content(&self, image: &[u8], below: Option<&[u8]>) -> Vec<u8> {
        Sectors.content(image, below)
    }
}

impl Builder for Faulty {
    fn cluster(&self) -> u64 {
        SECTOR
    }
    fn states(&self) -> &[Held] {
        Sectors.states()
    }
    fn build(&self, layer: &Layer) -> Vec<u8> {
        Sectors.build(layer)
    }
}

#[test]
fn each_broken_promise_is_found() {
    let faults = [
        (Fault::Decodes, "are not the whole"),
        (Fault::Omits, ""),
        (Fault::Skips, ""),
        (Fault::PlansLate, "before a plan"),
        (Fault::RefusesLate, "what was planned fails"),
        (Fault::Clobbers, "reads something else"),
        (Fault::EmptiesLoosely, "are not flushed"),
        (Fault::Keeps, "after it was emptied"),
    ];
    for (fault, why) in faults {
        let kit = Faulty(fault);
        let panic = catch_unwind(AssertUnwindSafe(|| verify_drawn(&kit, 0..6, CRASHES))).err();
        let panic = panic.unwrap_or_else(|| unreachable!("{fault:?} is not found"));
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| String::from(*text))).unwrap();
        std::println!("{fault:?}: {text}");
        assert!(text.contains(why), "{fault:?}: {text}");
    }
}

/// The sectors' driver, with a fault or none, as a format that is only read.
struct ReadOnly(Option<Fault>);

impl ImageKit for ReadOnly {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        match self.0 {
            Some(fault) => Faulty(fault).open_source(io, device),
            None => Sectors.open_source(io, device),
        }
    }
    fn open_sink(&self, _: &mut dyn BlockIo, _: &DeviceConfig, _: bool) -> DriverResult<Box<dyn Sink>> {
        unreachable!("it is no sink")
    }
    fn info(&self, image: &[u8]) -> ImageInfo {
        Sectors.info(image)
    }
    fn content(&self, image: &[u8], below: Option<&[u8]>) -> Vec<u8> {
        Sectors.content(image, below)
    }
    fn can_empty(&self) -> bool {
        false
    }
    fn has_sink(&self) -> bool {
        false
    }
}

impl Builder for ReadOnly {
    fn cluster(&self) -> u64 {
        SECTOR
    }
    fn states(&self) -> &[Held] {
        Sectors.states()
    }
    fn build(&self, layer: &Layer) -> Vec<u8> {
        Sectors.build(layer)
    }
}

#[test]
fn a_format_that_is_only_read_is_tested_as_well() {
    assert!(verify_drawn(&ReadOnly(None), 0..12, CRASHES).committed > 0);
    for fault in [Fault::Decodes, Fault::Omits, Fault::Skips] {
        let tried = AssertUnwindSafe(|| verify_drawn(&ReadOnly(Some(fault)), 0..12, CRASHES));
        assert!(catch_unwind(tried).is_err(), "{fault:?} is not found");
    }
}

/// Disks are whole units, whatever the cluster size is.
#[test]
fn no_disk_ends_within_a_unit() {
    struct Whole;
    impl ImageKit for Whole {
        fn open_source(&self, _: &mut dyn BlockIo, _: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
            unreachable!("nothing is opened")
        }
        fn open_sink(&self, _: &mut dyn BlockIo, _: &DeviceConfig, _: bool) -> DriverResult<Box<dyn Sink>> {
            unreachable!("nothing is opened")
        }
        fn info(&self, image: &[u8]) -> ImageInfo {
            ImageInfo { virtual_size: image.len() as u64, cluster_size: self.cluster() }
        }
        fn content(&self, image: &[u8], _: Option<&[u8]>) -> Vec<u8> {
            image.to_vec()
        }
    }
    impl Builder for Whole {
        fn cluster(&self) -> u64 {
            8 * SECTOR
        }
        fn unit(&self) -> u64 {
            4 * SECTOR
        }
        fn build(&self, layer: &Layer) -> Vec<u8> {
            layer.content(&[])
        }
        fn states(&self) -> &[Held] {
            &[Held::Data]
        }
    }
    let sizes: Vec<u64> = (0..50)
        .flat_map(|number| drawn(&Whole, &mut Random::seeded(number)))
        .map(|(_, image)| image.len() as u64)
        .collect();
    assert!(sizes.iter().all(|size| size % Whole.unit() == 0), "{sizes:?}");
    assert!(sizes.iter().any(|size| size % Whole.cluster() != 0), "{sizes:?}");
}
