//! `instar check`: is the metadata of an image consistent? The format's own module looks at it in the sandbox;
//! nothing is changed.

mod events;

pub use events::CheckEvents;

use crate::devices::Devices;
use crate::error::Error;
use crate::image::{check_immediate_parent, open_extra_files, Access, FilesOf};
use crate::operation::{run, DevicePaths, Ended, ImageSet, Named, Opener, Operation, Session, Settings};
use crate::sandbox::{guest_module, ModuleSpec};
use instar_guest_abi::{CheckSummary, FindingKind};
use std::path::PathBuf;

/// The guest's half.
pub const MODULE: ModuleSpec<'static> = guest_module!("check");

/// What the operator asks for.
#[derive(Clone, Debug, Default)]
pub struct CheckRequest {
    /// The image.
    pub image: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// Look at it even if something else is writing to it.
    pub force_share: bool,
    /// Plugins, directories, waiting.
    pub settings: Settings,
}

/// What a check found.
#[derive(Clone, Debug)]
pub struct CheckOutcome {
    /// The image's format.
    pub format: String,
    /// The sandbox that the guest ran in: "kvm" or "process".
    pub sandbox: &'static str,
    /// The findings, in numbers.
    pub found: CheckSummary,
    /// The first findings, one line each as the guest wrote it: not safe for a terminal.
    pub findings: Vec<(FindingKind, String)>,
}

/// Check an image.
///
/// # Errors
/// One line that names the file and what to do: when the image could not be checked to the end.
/// [`ErrorCode::NotImplemented`](instar_guest_abi::ErrorCode) for a format that has nothing to check.
pub fn run_check(request: &CheckRequest, session: &Session) -> Result<CheckOutcome, Error> {
    let check = Check { request, format: String::new() };
    run(check, session).map_err(|error| error.of_image(&request.image, None))
}

struct Check<'q> {
    request: &'q CheckRequest,
    format: String,
}

impl Operation for Check<'_> {
    type Events = CheckEvents;
    type Outcome = CheckOutcome;

    fn module(&self) -> ModuleSpec<'static> {
        MODULE
    }

    fn settings(&self) -> &Settings {
        &self.request.settings
    }

    fn named(&self) -> Named {
        Named::image(&self.request.image)
    }

    fn access(&self) -> Access {
        Access::to_read(self.request.force_share)
    }

    fn open<'r>(&mut self, opener: &Opener<'r, '_>) -> Result<ImageSet<'r>, Error> {
        let Opener { registry, gate, access, .. } = *opener;
        let mut image = opener.open_named(self.request.format.as_deref())?;
        check_immediate_parent(registry, &image, gate)?;
        open_extra_files(registry, &mut [FilesOf { image: &mut image, access, changes: false, gate }])?;
        self.format = image.facts.format.to_string();
        Ok(ImageSet::read([image]))
    }

    fn serve(&mut self, _: &mut Devices, _: &DevicePaths, _: &Session) -> Result<CheckEvents, Error> {
        Ok(CheckEvents::default())
    }

    fn finish(self, ended: Ended<CheckEvents>) -> Result<CheckOutcome, Error> {
        ended.end.map_err(|failure| failure.error_of_check(&ended.paths))?;
        let CheckEvents { found, findings } = ended.events;
        Ok(CheckOutcome { format: self.format, sandbox: ended.sandbox, found, findings })
    }
}
