//! The findings of a consistency pass.

use crate::error::{DriverError, DriverResult};
use alloc::string::String;
use instar_guest_abi::{ErrorCode, FindingKind};

/// What a check says at most before it stops: a table in a hole of the file names one place over and over.
const MOST: u64 = 100;

/// Callback for a fault of an image: the offset in the file of the field that is wrong, and a clause. An error ends the pass.
pub type Wrong<'a> = &'a mut dyn FnMut(u64, String) -> DriverResult<()>;

/// Run a consistency pass for [`Source::check`](crate::Source::check), and pass its faults to `finding`. After 100 of them, end
/// the pass with `rest`, a text that says that it has not examined the rest.
///
/// Returns the result of the pass, or `None` if it was ended, and the number of corruptions that were passed on.
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
