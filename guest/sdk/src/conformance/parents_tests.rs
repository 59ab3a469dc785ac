//! The harness with a driver that records parents as it should, and with drivers that break one promise each.
#![allow(clippy::unwrap_used)]
extern crate std;

use super::*;
use crate::{BlockIo, DriverError, DriverResult, Extent, Extents, Parent, Sink, Source};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use instar_guest_abi::{CheckSummary, DeviceConfig, ErrorCode, FindingKind, ImageInfo};
use std::panic::{catch_unwind, AssertUnwindSafe};

const CRASHES: Crashes = Crashes { drawn: 4, seed: 1 };
const PARENT: Parent<'_> = Parent { name: b"base", format: "raw", identity: None, virtual_size: SECTOR };

/// What a driver does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Nothing,
    /// It does not flush the new name before it counts.
    Hurries,
    /// It writes over the name that counts.
    Overwrites,
    /// It changes the image while it plans.
    PlansLate,
    /// It does not flush at the end.
    Forgets,
    /// It records something else.
    Mistakes,
    /// It changes the disk.
    Spoils,
    /// It finds something wrong afterwards.
    Leaks,
    /// It refuses a second run.
    Once,
}

/// An image of four sectors: a byte that says which of two names counts, the names, each behind its length, and the disk.
struct Slots(Fault);

struct Image {
    fault: Fault,
    sectors: Vec<u8>,
    name: Option<Vec<u8>>,
}

const fn slot(number: u8) -> usize {
    512 * number as usize
}

fn name(image: &[u8]) -> Option<&[u8]> {
    let at = slot(image[0]);
    (image[0] != 0).then(|| &image[at + 1..=at + usize::from(image[at])])
}

impl Source for Image {
    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: SECTOR, cluster_size: SECTOR }
    }
    fn verify(&mut self, _: &mut dyn BlockIo, _: bool) -> DriverResult<u64> {
        Ok(1)
    }
    fn extents(&mut self, _: &mut dyn BlockIo, range: Range<u64>, _: &mut Extents) -> DriverResult<u64> {
        Ok(range.end)
    }
    fn read(&mut self, _: &mut dyn BlockIo, _: &Extent, _: u64, _: &mut [u8]) -> DriverResult<()> {
        Ok(())
    }
    fn empty(&mut self, _: &mut dyn BlockIo) -> DriverResult<u64> {
        Ok(0)
    }
    fn check(&mut self, _: &mut dyn BlockIo, out: &mut dyn FnMut(FindingKind, &str)) -> DriverResult<CheckSummary> {
        if self.fault == Fault::Leaks && name(&self.sectors).is_some() {
            out(FindingKind::Leak, "a name");
        }
        Ok(CheckSummary::default())
    }
    fn plan_parent(&mut self, io: &mut dyn BlockIo, parent: Option<&Parent<'_>>) -> DriverResult<()> {
        let refused = |text: &str| Err(DriverError::new(ErrorCode::UnsupportedFormat, text));
        let name = parent.map(|parent| parent.name.to_vec());
        if name.as_ref().is_some_and(|name| name.is_empty() || name.len() > 255 || name.contains(&0)) {
            return refused("a name that the format cannot record");
        }
        if self.fault == Fault::PlansLate {
            io.write(OVERLAY, 1024, &[0])?;
        }
        if self.fault == Fault::Once && self::name(&self.sectors) == name.as_deref() {
            return refused("it is named already");
        }
        self.name = name;
        Ok(())
    }
    fn set_parent(&mut self, io: &mut dyn BlockIo) -> DriverResult<()> {
        let free = match (self.sectors[0], self.fault) {
            (counts, Fault::Overwrites) => counts.max(1),
            (1, _) => 2,
            _ => 1,
        };
        let mut counts = 0;
        if let Some(name) = self.name.take() {
            let name = if self.fault == Fault::Mistakes { b"bose".to_vec() } else { name };
            let mut bytes = vec![u8::try_from(name.len()).unwrap()];
            bytes.extend(name);
            let (length, name) = bytes.split_at(if self.fault == Fault::Overwrites { 1 } else { bytes.len() });
            io.write(OVERLAY, slot(free) as u64, length)?;
            io.write(OVERLAY, slot(free) as u64 + 1, name)?;
            counts = free;
        }
        if self.fault != Fault::Hurries {
            io.flush(OVERLAY)?;
        }
        if self.fault == Fault::Spoils {
            io.write(OVERLAY, slot(3) as u64, &[0])?;
        }
        io.write(OVERLAY, 0, &[counts])?;
        if self.fault != Fault::Forgets {
            io.flush(OVERLAY)?;
        }
        Ok(())
    }
}

impl ImageKit for Slots {
    fn open_source(&self, io: &mut dyn BlockIo, device: &DeviceConfig) -> DriverResult<Box<dyn Source>> {
        let mut sectors = vec![0; 2048];
        io.read(device.device, 0, &mut sectors)?;
        Ok(Box::new(Image { fault: self.0, sectors, name: None }))
    }
    fn open_sink(&self, _: &mut dyn BlockIo, _: &DeviceConfig, _: bool) -> DriverResult<Box<dyn Sink>> {
        Err(DriverError::new(ErrorCode::NotImplemented, "only a source"))
    }
    fn info(&self, _: &[u8]) -> ImageInfo {
        ImageInfo { virtual_size: SECTOR, cluster_size: SECTOR }
    }
    fn content(&self, image: &[u8], _: Option<&[u8]>) -> Vec<u8> {
        image[slot(3)..].to_vec()
    }
}

impl ParentKit for Slots {
    fn recorded(&self, image: &[u8]) -> Option<Recorded> {
        name(image).map(|name| Recorded { names: vec![name.to_vec()], ..Recorded::default() })
    }
    fn expected(&self, parent: &Parent<'_>) -> Recorded {
        Recorded { names: vec![parent.name.to_vec()], ..Recorded::default() }
    }
}

fn image() -> Vec<u8> {
    let mut image = vec![7; 2048];
    image[0] = 0;
    image
}

#[test]
fn a_driver_that_records_parents_conforms() {
    let kit = Slots(Fault::Nothing);
    let (report, image) = verify_parents(&kit, &image(), &[PARENT, Parent { name: b"other", ..PARENT }], CRASHES);
    assert!(report.changed == 4 && report.refused == 0 && report.states > 8, "{report:?}");
    assert_eq!(name(&image).unwrap(), b"base");
    // Three that are too long, an empty one, and one with a zero byte.
    assert_eq!(verify_odd_parents(&kit, &image, &PARENT, CRASHES), 5);
}

#[test]
fn each_broken_promise_is_found() {
    let faults = [
        (Fault::Hurries, "whole"),
        (Fault::Overwrites, "whole"),
        (Fault::PlansLate, "before a plan was accepted"),
        (Fault::Forgets, "are not flushed"),
        (Fault::Mistakes, "whole"),
        (Fault::Spoils, "reads something else"),
        (Fault::Leaks, "corruptions and leaks"),
        (Fault::Once, "a second run fails"),
    ];
    for (fault, why) in faults {
        let parents = [PARENT, Parent { name: b"other", ..PARENT }];
        let panic = catch_unwind(AssertUnwindSafe(|| verify_parents(&Slots(fault), &image(), &parents, CRASHES)));
        let panic = panic.err().unwrap_or_else(|| unreachable!("{fault:?} is not found"));
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| String::from(*text))).unwrap();
        std::println!("{fault:?}: {text}");
        assert!(text.contains(why), "{fault:?}: {text}");
    }
}
