//! An image is repaired, as `instar check -r` does it.

use super::{is_kept, Ended, Outcome, Trial};
use crate::operations::bounded_devices::BoundedDevices;
use crate::operations::open_source;
use instar_guest_abi::{CheckSummary, DeviceConfig, DeviceRole, Phase, Repair, RepairSummary};
use instar_guest_sdk::{BlockIo, DriverResult};

/// Bytes by which the file may become longer, besides a sixteenth.
const ROOM: u64 = 16 << 20;

pub fn run(trial: &mut Trial<'_>, mut io: BoundedDevices) -> Outcome {
    let chain = trial.fixture.chain();
    let device = chain[trial.random.index(chain.len())];
    let what = *trial.random.pick(&[Repair::Leaks, Repair::All, Repair::All]);
    let length = trial.facts[&device].file_length;
    let config = trial.config(device, true, length.saturating_add(length / 16).saturating_add(ROOM));
    io.devices.hold([(DeviceRole::Target, &config)]);
    let format = trial.fixture.formats[&device];
    let check = |io: &mut BoundedDevices, config: &DeviceConfig| -> DriverResult<CheckSummary> {
        open_source(format, io, config)?.check(io, &mut |_, text| assert!(!text.is_empty()))
    };
    let before = trial.view(trial.files, &[device]);
    let planned = check(&mut io, &config).and_then(|found| {
        let mut source = open_source(format, &mut io, &config)?;
        let plan = source.plan_repair(&mut io, what, &mut |_, text| assert!(!text.is_empty()))?;
        Ok((found, source, plan))
    });
    let (found, mut source, plan) = match planned {
        Ok(planned) => planned,
        Err(error) => return Ok(Some(Ended { io, result: Err((true, error)), compared: false })),
    };
    let RepairSummary { corruptions, leaks, final_length } = plan;
    if (corruptions, leaks) == (0, 0) {
        return Ok(Some(Ended { io, result: Ok(()), compared: before.is_some() }));
    }
    io.enter(Phase::Target);
    let result = source.repair(&mut io).map_err(|error| (false, error));
    drop(source);
    let now = &io.devices.files;
    trial.snapshots_are_kept(device, &now[&device])?;
    let compared = match (before, trial.view(now, &[device])) {
        (Some(before), Some(after)) => is_kept(&before, &after, before.states.len(), "the image").map(|()| true)?,
        (Some(_), None) => return Err("the image cannot be read any more".into()),
        (None, _) => false,
    };
    if result.is_ok() {
        let longer = DeviceConfig { file_length: length.max(final_length), ..config };
        let again = check(&mut io, &longer).map_err(|error| format!("what was repaired cannot be checked: {error}"))?;
        // A leak may be what a corruption becomes, and no corruption comes to it.
        if again.corruptions > found.corruptions.saturating_sub(corruptions.min(found.corruptions)) {
            return Err(format!("{what:?} of {found:?}, planned {plan:?}, leaves {again:?}"));
        }
    }
    Ok(Some(Ended { io, result, compared }))
}
