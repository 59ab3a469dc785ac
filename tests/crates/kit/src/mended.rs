//! Repairs of one image, as `instar check -r` does them, for the tests of any driver: what was readable stays readable, a
//! repair that a power loss interrupts is finished by another one, and what is not mended is told.

use crate::{Disk, FormatKit, SectorState};
use instar_guest_abi::{
    device_flags, CheckSummary, DeviceConfig, DeviceRole, Phase, Repair, RepairSummary, DEVICE_OUTPUT,
};
use instar_guest_sdk::crash::Crashes;
use instar_guest_sdk::memory::MemoryDevices;
use instar_guest_sdk::{BlockIo, DriverResult};
use std::collections::BTreeSet;
use std::panic::{catch_unwind, AssertUnwindSafe};

/// Bytes by which every file may become longer, besides a sixteenth: as the engine grants it.
const ROOM: u64 = 16 << 20;

/// A repair that was done, or that had nothing to do.
#[derive(Debug)]
pub struct Mended {
    /// What the check found before it.
    pub before: CheckSummary,
    /// What was planned.
    pub planned: RepairSummary,
    /// What was said not to be mended.
    pub told: Vec<String>,
    /// What the check found afterwards.
    pub after: CheckSummary,
    /// The devices afterwards.
    pub io: MemoryDevices,
}

impl Mended {
    /// The image.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.io.files[&DEVICE_OUTPUT]
    }
}

/// What a check of an image finds.
///
/// # Errors
/// What the driver refuses.
pub fn check(kit: &dyn FormatKit, bytes: &[u8]) -> DriverResult<CheckSummary> {
    let mut io = MemoryDevices::new([(DEVICE_OUTPUT, bytes.to_vec())]);
    let device = device(kit, bytes, 0);
    io.hold([(DeviceRole::Target, &device)]);
    let mut source = kit.open_source(&mut io, &device)?;
    source.check(&mut io, &mut |_, _| ())
}

fn device(kit: &dyn FormatKit, bytes: &[u8], flags: u32) -> DeviceConfig {
    let info = kit.info(bytes);
    let length = bytes.len() as u64;
    DeviceConfig {
        flags: device_flags::PRESENT | device_flags::WRITABLE | flags,
        device: DEVICE_OUTPUT,
        file_length: length,
        max_length: if flags == 0 { length + length / 16 + ROOM } else { length },
        virtual_size: info.virtual_size,
        cluster_size: info.cluster_size,
        ..DeviceConfig::default()
    }
}

/// Repair an image on these devices, in the steps of the operation. Returns what was planned, and what was told.
///
/// # Errors
/// What the driver refuses, or fails at.
pub fn repair_on(
    kit: &dyn FormatKit,
    io: &mut MemoryDevices,
    what: Repair,
    flags: u32,
) -> DriverResult<(RepairSummary, Vec<String>)> {
    let device = device(kit, &io.files[&DEVICE_OUTPUT], flags);
    io.hold([(DeviceRole::Target, &device)]);
    let mut source = kit.open_source(io, &device)?;
    let mut told = Vec::new();
    let planned = source.plan_repair(io, what, &mut |_, text| told.push(text.to_owned()))?;
    assert!(io.log.is_empty(), "a plan changes nothing");
    assert!(planned.final_length <= device.max_length, "{planned:?}");
    if (planned.corruptions, planned.leaks) != (0, 0) {
        io.enter(Phase::Target);
        source.repair(io)?;
        assert_eq!(io.unflushed(), BTreeSet::new());
        let longest = planned.final_length.max(device.file_length);
        assert!(io.files[&DEVICE_OUTPUT].len() as u64 <= longest, "longer than planned");
    }
    Ok((planned, told))
}

/// Repair an image, and look at it before and afterwards.
///
/// # Errors
/// What the driver refuses.
pub fn mend(kit: &dyn FormatKit, bytes: &[u8], what: Repair) -> DriverResult<Mended> {
    let before = check(kit, bytes)?;
    let mut io = MemoryDevices::new([(DEVICE_OUTPUT, bytes.to_vec())]);
    let (planned, told) = repair_on(kit, &mut io, what, 0)?;
    let after = check(kit, &io.files[&DEVICE_OUTPUT])?;
    Ok(Mended { before, planned, told, after, io })
}

/// Whether everything that could be read of one image reads the same of another: the disk, and each internal snapshot.
#[must_use]
pub fn keeps_content(kit: &dyn FormatKit, was: &[u8], is: &[u8]) -> bool {
    let keeps = |was: &Option<Disk>, is: &Option<Disk>| match (was, is) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(was), Some(is)) => {
            was.length == is.length
                && (0..was.states.len()).all(|number| match was.states[number] {
                    SectorState::Unreadable => true,
                    state => state == is.states[number] && was.sector(number) == is.sector(number),
                })
        }
    };
    let (snapshots_were, snapshots_are) = (kit.salvage_snapshots(was), kit.salvage_snapshots(is));
    keeps(&kit.salvage(was), &kit.salvage(is))
        && snapshots_were.len() == snapshots_are.len()
        && snapshots_were.iter().zip(&snapshots_are).all(|(was, is)| keeps(was, is))
}

/// Repair an image, and verify what holds of every repair. Panics if something does not.
pub fn verify_mended(kit: &dyn FormatKit, bytes: &[u8], what: Repair) -> Mended {
    let mended = match mend(kit, bytes, what) {
        Ok(mended) => mended,
        Err(error) => unreachable!("{error}"),
    };
    verify(kit, bytes, what, &mended);
    mended
}

/// What holds of every repair.
pub fn verify(kit: &dyn FormatKit, bytes: &[u8], what: Repair, mended: &Mended) {
    let Mended { before, planned, told, after, .. } = mended;
    assert!(keeps_content(kit, bytes, mended.bytes()), "the content changed: {mended:?}");
    if (planned.corruptions, planned.leaks) == (0, 0) {
        assert!(mended.io.log.is_empty() && mended.bytes() == bytes, "nothing was to be mended, and something changed");
    }
    assert!(after.leaks + planned.leaks == before.leaks, "leaks: {before:?} {planned:?} {after:?}");
    assert!(after.corruptions <= before.corruptions, "corruptions: {before:?} {planned:?} {after:?}");
    if what == Repair::All {
        assert!(after.corruptions == 0 || !told.is_empty(), "what is left is not told: {after:?}");
    }
    let Ok(again) = mend(kit, mended.bytes(), what) else { unreachable!("a repaired image cannot be opened") };
    assert!(again.io.log.is_empty(), "a second repair finds more: {:?}", again.planned);
}

/// Repair damaged images, as far as the host half and the check take them, and [`verify`] each. Returns how many were changed,
/// and in how many something is wrong afterwards.
///
/// # Panics
/// If a promise is broken.
pub fn verify_damaged(kit: &dyn FormatKit, images: impl Iterator<Item = Vec<u8>>) -> (usize, usize) {
    let (mut changed, mut left) = (0, 0);
    for bytes in images {
        if catch_unwind(AssertUnwindSafe(|| kit.info(&bytes))).is_err() {
            continue;
        }
        if let Ok(mended) = mend(kit, &bytes, Repair::All) {
            verify(kit, &bytes, Repair::All, &mended);
            changed += usize::from(!mended.io.log.is_empty());
            left += usize::from(mended.after.corruptions != 0);
        }
    }
    (changed, left)
}

/// Repair an image, and stop at every state that a power loss can leave: everything reads as before, `is_worse` holds of none
/// (which is shown the image before and now), and another repair finishes it. Returns how many states there were.
pub fn verify_crashes(
    kit: &dyn FormatKit,
    bytes: &[u8],
    (what, crashes): (Repair, Crashes),
    is_worse: &dyn Fn(&[u8], &[u8]) -> bool,
) -> usize {
    let mended = verify_mended(kit, bytes, what);
    let before = [(DEVICE_OUTPUT, bytes.to_vec())].into();
    crashes.each_again(&before, &mended.io.log, &mut |files| {
        let now = &files[&DEVICE_OUTPUT];
        assert!(keeps_content(kit, bytes, now), "the content is another one at an instant");
        assert!(!is_worse(bytes, now), "worse than before");
        let again = verify_mended(kit, now, what);
        assert_eq!(
            (again.after.corruptions, again.after.leaks),
            (mended.after.corruptions, mended.after.leaks),
            "{again:?}"
        );
        again.io.log
    })
}

/// Let each request of a repair fail once: everything reads as before, and another repair finishes it.
pub fn verify_failing_requests(kit: &dyn FormatKit, bytes: &[u8], what: Repair) {
    let whole = verify_mended(kit, bytes, what);
    for request in 0..whole.io.executed() {
        let mut io = MemoryDevices::new([(DEVICE_OUTPUT, bytes.to_vec())]);
        io.fail_at = Some(request);
        let failed = repair_on(kit, &mut io, what, 0).map_err(|error| error.errno);
        assert!(matches!(failed, Err(5)), "request {request}: {failed:?}");
        let now = &io.files[&DEVICE_OUTPUT];
        assert!(keeps_content(kit, bytes, now), "request {request}");
        let again = verify_mended(kit, now, what);
        assert_eq!((again.after.corruptions, again.after.leaks), (whole.after.corruptions, whole.after.leaks));
    }
}
