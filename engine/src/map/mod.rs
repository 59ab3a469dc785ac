//! `instar map`: which layer of a chain holds which bytes of the virtual disk, and where in its file. The formats' own modules
//! look up their tables in the sandbox; the host adds the holes that the file systems know.

mod events;
mod operation;
mod places;
mod runs;

pub use events::MapEvents;
pub(crate) use places::{cut_at_holes, is_plausible, message_limit, most_runs};
pub use places::{places, HoleMeaning, Place};
pub use runs::{MapRun, Runs};

use crate::error::{Error, Role};
use crate::operation::{run, Session, Settings};
use crate::sandbox::{guest_module, ModuleSpec};
use operation::Map;
use std::ops::Range;
use std::path::PathBuf;

/// The guest's half.
pub const MODULE: ModuleSpec<'static> = guest_module!("map");

/// The operator's request.
#[derive(Clone, Debug, Default)]
pub struct MapRequest {
    /// The image.
    pub image: PathBuf,
    /// Its format, if the operator names it.
    pub format: Option<String>,
    /// Read the images even while another process writes to them.
    pub force_share: bool,
    /// The guest bytes of interest.
    pub range: Range<u64>,
    /// Plugins, directories, waiting.
    pub settings: Settings,
}

/// Map an image and the layers below it, and pass the runs to `each`, in order.
///
/// # Errors
/// One line that names the file and what to do; the error that `each` returns ends the map. What was reported until then
/// stays reported.
pub fn run_map(
    request: &MapRequest,
    session: &Session,
    each: &mut dyn FnMut(&MapRun<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    run(Map::new(request, Box::new(each)), session)
        .map_err(|error| error.of_image(&request.image, Some(Role::Ancestor)))
}
