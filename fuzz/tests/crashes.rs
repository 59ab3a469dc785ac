//! Power losses in commits between all formats: of valid images, and of the corpora of the fuzz targets.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use instar_fuzz::corpus;
use instar_fuzz::formats::Format;
use instar_fuzz::operations::{Complaint, Fixture, Pairs, PowerLosses};
use instar_guest_sdk::crash::Crashes;
use instar_testkit::crash_states_drawn as drawn;
use std::path::Path;
use std::process::Command;

/// Bytes of images that are large.
const LARGE: usize = 4 << 20;

/// `qemu-img check`, which does not look at what is below an image. Leaks are no complaint: a power loss may leave some. A log that
/// is to be replayed keeps it from opening a VHDX only to read it.
fn qemu_img(directory: &Path, format: &Format, bytes: &[u8]) -> Result<(), Complaint> {
    let path = directory.join("image");
    std::fs::write(&path, bytes).unwrap();
    let driver = format.name;
    let file = path.display();
    let image =
        format!(r#"json:{{"driver":"{driver}","backing":null,"file":{{"driver":"file","filename":"{file}"}}}}"#);
    let repair: &[&str] = if driver == "vhdx" { &["-r", "all"] } else { &[] };
    let result = Command::new("qemu-img").arg("check").args(repair).arg(&image).output();
    let result = result.unwrap_or_else(|error| panic!("qemu-img is needed: apt-get install qemu-utils ({error})"));
    let text = String::from_utf8_lossy(&result.stdout) + String::from_utf8_lossy(&result.stderr);
    match result.status.code() {
        Some(0 | 3) => Ok(()),
        Some(2) => Err(Complaint::Corrupt(text.into_owned())),
        _ => Err(Complaint::Refused(text.into_owned())),
    }
}

/// Whether the images that an input names are large, as VHDX is. States of those take long: `make crash` looks at those of valid
/// images, and draws one of them after each change. Their drivers' own tests look at all, and drawn chains (`tests/chains.rs`)
/// are stopped, too.
fn is_large(pairs: &Pairs, input: &[u8]) -> bool {
    let bytes = |fixture: &Fixture| fixture.files.values().map(Vec::len).sum::<usize>();
    pairs.choose(input).is_some_and(|fixture| bytes(fixture) >= LARGE)
}

/// How many of these inputs are commits, of each of which `drawn` states are drawn. One in `every` images that are left
/// is shown to qemu-img.
fn of(pairs: &Pairs, inputs: Vec<Vec<u8>>, drawn: usize, every: usize) -> usize {
    let directory = tempfile::tempdir().unwrap();
    let checker = |format: &Format, bytes: &[u8]| qemu_img(directory.path(), format, bytes);
    let crashes = Crashes { drawn, seed: 1 };
    let mut losses = PowerLosses { pairs, crashes, checker: &checker, every, seen: 0 };
    let (mut commits, mut all) = (0, 0);
    for input in inputs {
        // What a failure has to show.
        println!("{pairs:?} {input:02x?}");
        if let Some(states) = losses.of(&input) {
            all += states;
            println!("crash states: {states}");
            commits += 1;
        }
    }
    assert!(all > 2 * commits && losses.seen > every, "{all} states of {commits} commits, {} images", losses.seen);
    commits
}

#[test]
fn of_valid_images() {
    for pairs in Pairs::all() {
        let step = if drawn().is_none() { 2 } else { 1 };
        let images = (0..u8::try_from(pairs.fixtures.len()).unwrap()).step_by(step).map(|images| vec![images]);
        let (large, small): (Vec<_>, Vec<_>) = images.partition(|input| is_large(pairs, input));
        for (inputs, drawn) in [(small, drawn().or(Some(1))), (large, drawn().and(Some(1)))] {
            let (count, Some(drawn)) = (inputs.len(), drawn.filter(|_| !inputs.is_empty())) else { continue };
            assert_eq!(of(pairs, inputs, drawn, 20), count);
        }
    }
}

/// In `make crash` also of what a fuzzer has found since, if it ran here.
#[test]
fn of_what_covers_more_code() {
    for pairs in Pairs::all() {
        let mut inputs: Vec<Vec<u8>> =
            corpus::load(&pairs.target).unwrap().into_iter().map(|input| input.bytes).collect();
        if drawn().is_some() {
            let since = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/fuzz/corpus").join(&pairs.target);
            let files = std::fs::read_dir(since).into_iter().flatten().map(|entry| entry.unwrap().path());
            inputs.extend(files.map(|file| std::fs::read(file).unwrap()));
        }
        inputs.retain(|input| !is_large(pairs, input));
        if drawn().is_none() {
            // A part of the large corpora, which `make crash` is the whole of.
            let step = (inputs.len() / 40).max(1);
            inputs = inputs.into_iter().step_by(step).collect();
        }
        let count = inputs.len();
        if count == 0 {
            continue;
        }
        let commits = of(pairs, inputs, drawn().unwrap_or(1), 100);
        assert!(commits > 5, "{pairs:?}: {commits} of {count} are commits");
    }
}
