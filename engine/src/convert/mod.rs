//! `instar convert`: the disk that an image shows, with everything below it, becomes a new image of any format.
//!
//! The engine creates the new image as [`create`](crate::create) does, in a file without a name, fills it in the
//! sandbox by the steps of a commit, and gives it its name when it is complete and durable. With `-n`, it fills an
//! existing image in place.

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

/// The guest's half of the operation.
pub const MODULE: ModuleSpec<'static> = guest_module!("convert");

/// Convert an image.
///
/// # Errors
/// One line that names the file and what to do. The file at the target's name is unchanged, unless it is written in
/// place.
pub fn run_convert(request: &ConvertRequest, session: &Session) -> Result<ConvertOutcome, Error> {
    let result = run(Convert::new(request), session);
    // The guest takes the steps of a commit, but here the source is no overlay, and the target is no backing.
    result.map_err(|error| match error.path() {
        Some(path) if path == request.target => error.with_role(None),
        _ => error.with_role(None).of_image(&request.source, Some(Role::Ancestor)),
    })
}
