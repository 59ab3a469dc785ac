//! What a consistency pass tells of an image.

use crate::error::{DriverError, DriverResult};
use alloc::string::String;
use instar_guest_abi::{ErrorCode, FindingKind};

/// What a check says at most before it stops: a table in a hole of the file names one place over and over.
const MOST: u64 = 100;

/// Who is told what is wrong with an image: the byte of the file that says so, and a clause. An error ends the pass.
pub type Wrong<'a> = &'a mut dyn FnMut(u64, String) -> DriverResult<()>;

/// Run a consistency pass for [`Source::check`](crate::Source::check). Everything that is wrong goes to `finding`, unless there
/// is too much of it: then `rest` says so, and that the rest was not looked at.
///
/// Returns what the pass has found, `None` if it was ended for that, and how many corruptions were told.
///
/// # Errors
/// Those of the pass that have another cause.
pub fn tell_findings<T>(
    finding: &mut dyn FnMut(FindingKind, &str),
    rest: &str,
    pass: impl FnOnce(Wrong<'_>) -> DriverResult<T>,
) -> DriverResult<(Option<T>, u64)> {
    let mut corruptions = 0;
    let found = pass(&mut |_, text| {
        corruptions += 1;
        finding(FindingKind::Corruption, &text);
        if corruptions < MOST {
            Ok(())
        } else {
            Err(DriverError::new(ErrorCode::OverlayCorrupt, text))
        }
    });
    match found {
        Ok(found) => Ok((Some(found), corruptions)),
        Err(_) if corruptions >= MOST => {
            finding(FindingKind::Corruption, rest);
            Ok((None, corruptions))
        }
        Err(error) => Err(error),
    }
}
