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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn told(wrong: u64, failing: bool) -> (DriverResult<(Option<u64>, u64)>, Vec<String>) {
        let mut findings = Vec::new();
        let mut finding = |_: FindingKind, text: &str| findings.push(String::from(text));
        let result = tell_findings(&mut finding, "the rest", |tell| {
            (0..wrong).try_for_each(|number| tell(number, alloc::format!("number {number}")))?;
            if failing {
                Err(crate::overflow("a place"))
            } else {
                Ok(7)
            }
        });
        (result, findings)
    }

    #[test]
    fn a_pass_is_ended_when_too_much_is_wrong() {
        let (result, findings) = told(MOST - 1, false);
        assert_eq!((result.unwrap(), findings.len()), ((Some(7), MOST - 1), 99));
        let (result, findings) = told(MOST + 50, false);
        assert_eq!((result.unwrap(), findings.len()), ((None, MOST), 101));
        assert_eq!([&findings[99], &findings[100]], ["number 99", "the rest"]);
        assert_eq!(told(3, true).0.unwrap_err().code, ErrorCode::InternalOverflow);
    }
}
