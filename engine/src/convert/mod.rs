//! `instar convert`: the disk that an image shows, with everything below it, becomes a new image of any format.
//!
//! The new image is created as by [`create`](crate::create), in a file that has no name; it is filled in the sandbox by the
//! same steps as a commit's; and it gets its name when it is complete and durable. With `-n`, the image is there already, and is
//! filled in place.

mod end;
mod existing;
mod in_parts;
mod operation;
mod parent;
mod request;

pub use request::{ConvertOutcome, ConvertRequest};

use crate::error::{Error, Role};
use crate::operation::{run, Session};
use crate::sandbox::{guest_module, ModuleSpec};
use operation::Convert;

/// The guest's half.
pub const MODULE: ModuleSpec<'static> = guest_module!("convert");

/// Convert an image.
///
/// # Errors
/// One line that names the file and what to do. At the target's name stands what stood there before, unless it is written in
/// place.
pub fn run_convert(request: &ConvertRequest, session: &Session) -> Result<ConvertOutcome, Error> {
    let result = run(Convert::new(request), session);
    // The guest's steps are those of a commit: what is read is no overlay here, and the target is nobody's backing.
    result.map_err(|error| match error.path() {
        Some(path) if path == request.target => error.with_role(None),
        _ => error.with_role(None).of_image(&request.source, Some(Role::Ancestor)),
    })
}
