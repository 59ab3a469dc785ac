//! `instar check`: is the metadata of an image consistent? The format's own module examines it in the sandbox. Nothing changes
//! unless the operator asks for a repair: then the module plans what it can mend without loss, mends it, and examines the image
//! again.

mod events;

pub use events::{CheckEvents, Findings, Grant};

use crate::confine::Work;
use crate::devices::{Device, Devices};
use crate::error::Error;
use crate::image::{check_immediate_parent, open_extra_files, Access, FilesOf};
use crate::operation::{run, DevicePaths, Ended, Grants, ImageSet, Meter, Named, Opener, Operation, Session, Settings};
use crate::sandbox::{guest_module, ModuleSpec};
use instar_guest_abi::{CheckSummary, Phase, Repair};
use instar_guest_protocol::check::Config;
use instar_guest_protocol::Message;
use std::path::PathBuf;

/// Bytes by which the files of any image may become longer when it is repaired; a sixteenth of their length comes on top. What
/// is made new are tables, of which the largest say two bytes of each 64 KiB.
const ROOM: u64 = 16 << 20;

/// The guest's half.
pub const MODULE: ModuleSpec<'static> = guest_module!("check");

/// The operator's request.
#[derive(Clone, Debug, Default)]
pub struct CheckRequest {
    /// The image.
    pub image: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// Examine the image even while another process writes to it. A repair needs an image that nobody uses.
    pub force_share: bool,
    /// Repair the findings, as far as that loses nothing.
    pub repair: Option<Repair>,
    /// Report what a repair would do, and change nothing.
    pub dry_run: bool,
    /// Plugins, directories, waiting.
    pub settings: Settings,
}

/// The result of a check.
#[derive(Clone, Debug)]
pub struct CheckOutcome {
    /// The image's format.
    pub format: String,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
    /// The number of findings; after a repair, of those that are left.
    pub found: CheckSummary,
    /// The first findings, one line each as the guest wrote it: not safe for a terminal.
    pub findings: Findings,
    /// The result of the repair, if one was requested.
    pub repair: Option<Repaired>,
}

/// The result of a repair or, in a dry run, its plan.
#[derive(Clone, Debug)]
pub struct Repaired {
    /// Corruptions that were mended, as the check counts them, and a mark in the header that was cleared.
    pub corruptions: u64,
    /// Leaked clusters that were given back.
    pub leaks: u64,
    /// Whether this was a dry run, which changes nothing.
    pub dry_run: bool,
    /// The number of findings of the check before the repair.
    pub before: CheckSummary,
    /// The first findings of that check; empty if nothing was changed, as they are those of the outcome.
    pub findings: Findings,
    /// Faults that were left alone, in one line each that says what a repair would lose: not safe for a terminal.
    pub kept: Findings,
}

impl Repaired {
    /// Whether anything was changed.
    #[must_use]
    pub fn changed(&self) -> bool {
        !self.dry_run && (self.corruptions, self.leaks) != (0, 0)
    }
}

/// Check an image, and repair it if the request says so.
///
/// # Errors
/// One line that names the file and what to do: when the image could not be checked, or repaired, to the end.
/// [`ErrorCode::NotImplemented`](instar_guest_abi::ErrorCode) for a format that has nothing to check, or cannot be repaired.
pub fn run_check(request: &CheckRequest, session: &Session) -> Result<CheckOutcome, Error> {
    let check = Check { request, format: String::new() };
    run(check, session).map_err(|error| error.of_image(&request.image, None))
}

struct Check<'q> {
    request: &'q CheckRequest,
    format: String,
}

impl Check<'_> {
    /// Whether the image may be changed.
    fn changes(&self) -> bool {
        self.request.repair.is_some() && !self.request.dry_run
    }
}

impl Operation for Check<'_> {
    type Events = CheckEvents;
    type Outcome = CheckOutcome;

    fn module(&self) -> ModuleSpec<'static> {
        MODULE
    }

    fn work(&self) -> (Work, Work) {
        if self.changes() {
            (Work::OpenToCommit, Work::Commit)
        } else {
            (Work::OpenToRead, Work::Read)
        }
    }

    fn most_processors(&self) -> usize {
        1
    }

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        Named::image(&self.request.image)
    }

    fn access(&self) -> Access {
        if self.changes() {
            Access::ReadWrite
        } else {
            Access::to_read(self.request.force_share)
        }
    }

    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
        let Opener { registry, session, gate, access, .. } = *opener;
        let mut image = opener.open_named(self.request.format.as_deref())?;
        check_immediate_parent(registry, &image, gate, session.cancel())?;
        let changes = self.request.repair.is_some();
        open_extra_files(registry, &mut [FilesOf { image: &mut image, access, changes, gate }])?;
        self.format = image.facts.format.to_string();
        // What is repaired is the operation's target, although it is read first.
        Ok(if changes { ImageSet { target: Some(image), ..ImageSet::default() } } else { ImageSet::read([image]) })
    }

    fn admit(&mut self, images: &mut ImageSet<'_>, _: &Session) -> Result<Grants, Error> {
        let length = images.target.as_ref().map_or(0, |image| image.facts.file_length);
        Ok(Grants { target: length.saturating_add(length / 16).saturating_add(ROOM), ..Grants::default() })
    }

    fn payload(&self) -> Vec<u8> {
        let repair = self.request.repair.map_or(0, |repair| repair as u32);
        Config { repair, dry_run: self.request.dry_run }.encode_to_vec()
    }

    fn serve(&mut self, devices: &mut Devices, paths: &DevicePaths, session: &Session) -> Result<CheckEvents, Error> {
        let meter = Some(Meter::new(session.observer().clone(), 0, devices, paths.target(), false));
        if self.request.repair.is_none() {
            return Ok(CheckEvents { meter, ..CheckEvents::default() });
        }
        devices.pace_mut().stop_when(session.cancel().clone());
        let longest = paths.target().filter_map(|number| devices.device(number)).map(Device::max_length);
        let grant = Grant {
            last_phase: if self.changes() { Phase::Target } else { Phase::Inspect },
            longest: longest.fold(0, u64::saturating_add),
        };
        Ok(CheckEvents { meter, ..CheckEvents::repairing(grant) })
    }

    fn finish(self, ended: Ended<CheckEvents>) -> Result<CheckOutcome, Error> {
        let state = self.changes().then(|| state(&ended.devices));
        ended.end.map_err(|failure| failure.error_of_check(&ended.paths, state))?;
        let CheckEvents { found, findings, plan, kept, before, .. } = ended.events;
        let repair = plan.map(|plan| Repaired {
            corruptions: plan.corruptions,
            leaks: plan.leaks,
            dry_run: self.request.dry_run,
            before: plan.found.as_ref().map(events::summary).unwrap_or_default(),
            findings: before,
            kept,
        });
        Ok(CheckOutcome { format: self.format, sandbox: ended.sandbox, found, findings, repair })
    }
}

/// What became of the image of a repair that failed, by what the devices did.
fn state(devices: &Devices) -> &'static str {
    if devices.any_changed() {
        "the image reads as before, and running the repair again finishes it"
    } else {
        "nothing was changed"
    }
}
