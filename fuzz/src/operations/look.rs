//! `instar check` and `instar map`: they change nothing, whatever the images say.

use super::bounded_devices::BoundedDevices;
use super::change::apply;
use super::fixtures::Pairs;
use super::{config, open_source, quietly, sound, views, Fixture, OVERLAY};
use crate::host;
use instar_guest_abi::ExtentKind;
use instar_guest_protocol::map::Run;
use instar_guest_sdk::{DriverResult, Source};
use instar_guest_view::Layers;
use instar_plugin_api::ImageFacts;
use std::collections::BTreeMap;

/// Bytes of a disk up to which it is compared with what the map says.
const COMPARED: u64 = 4 << 20;

/// The images that an input is about, of those of all targets.
fn choose(input: &[u8]) -> Option<&'static Fixture> {
    let fixtures = || Pairs::all().iter().flat_map(|pairs| &pairs.fixtures);
    fixtures().nth(usize::from(*input.first()?) % fixtures().count())
}

/// Check the overlay and map the chain, after the changes that the input describes.
pub fn look(input: &[u8]) {
    let Some(fixture) = choose(input) else { return };
    let files = apply(fixture, input);
    let facts = files.iter().map(|(device, bytes)| Some((*device, host::look(fixture.formats[device], bytes)?)));
    let Some(facts) = facts.collect::<Option<BTreeMap<u32, ImageFacts>>>() else { return };
    let all_sound = files.iter().all(|(device, bytes)| sound(fixture.formats[device], bytes));
    let mut io = BoundedDevices::look(files);

    let overlay = config(OVERLAY, &facts[&OVERLAY], false, 0);
    let mut findings: Vec<String> = Vec::new();
    let examined = open_source(fixture.formats[&OVERLAY], &mut io, &overlay).and_then(|mut source| {
        source.check(&mut io, &mut |_, text| {
            assert!(!text.is_empty());
            findings.push(text.into());
        })
    });
    // The checker of the testkit does not look at bits that are reserved, nor at flags of entries that point nowhere.
    let undecoded = !fixture.formats[&OVERLAY].kit.checks_everything()
        || findings.iter().any(|text| text.contains("not looked at"));
    if let (true, false, Ok(found)) = (all_sound && !facts[&OVERLAY].dirty, undecoded, &examined) {
        assert_eq!(found.corruptions, 0, "the image makes sense: {findings:?}");
    }
    if let Ok(found) = examined {
        assert!(!findings.is_empty() || found.corruptions + found.leaks == 0, "{found:?}");
    }

    let mut runs: Vec<Run> = Vec::new();
    let chain = fixture.chain();
    let mapped: DriverResult<()> = (|| {
        let mut layers: Vec<Box<dyn Source>> = Vec::new();
        for device in chain {
            let config = config(*device, &facts[device], false, 0);
            layers.push(open_source(fixture.formats[device], &mut io, &config)?);
        }
        instar_guest_map::map(&mut Layers::new(layers), &mut io, &mut |run| runs.push(run))
    })();
    let mut next = 0;
    for run in &runs {
        assert!(run.start == next && run.length > 0, "{run:?} after {next}");
        next += run.length;
    }
    let size = facts[&OVERLAY].virtual_size;
    assert!(if mapped.is_ok() { next == size } else { next <= size }, "{next} of {size}");
    assert_eq!(io.devices.log, vec![]);
    if mapped.is_err() || !all_sound || size > COMPARED {
        return;
    }
    let Ok(views) = quietly(|| views(fixture, &io.devices.files)) else { return };
    for run in runs {
        let seen = &views[&OVERLAY][run.start as usize..(run.start + run.length) as usize];
        match ExtentKind::from_u32(run.kind) {
            Some(ExtentKind::Data) => {
                let file = io.devices.files[&run.device].iter().copied().chain(std::iter::repeat(0));
                assert!(file.skip(run.offset as usize).take(seen.len()).eq(seen.iter().copied()), "{run:?}");
            }
            Some(ExtentKind::Encoded) => {}
            _ => assert!(seen.iter().all(|&byte| byte == 0), "{run:?}"),
        }
    }
}
