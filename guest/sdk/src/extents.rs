//! What the interface promises of the extents that a source enumerates.

use alloc::format;
use alloc::string::String;
use instar_guest_abi::{Extent, ExtentKind};

/// Check `found`, enumerated from guest byte `from` on of an image of `size` bytes, with `next` as the place to go on.
///
/// # Errors
/// The first promise that is broken, with its numbers, in one clause.
pub fn check_extents(found: &[Extent], from: u64, next: u64, size: u64) -> Result<(), String> {
    let mut after = from;
    for (index, extent) in found.iter().enumerate() {
        let Extent { guest_offset, length, kind, .. } = *extent;
        let which = format!("extent {index} of {} from guest byte {from} on", found.len());
        let known = ExtentKind::from_u32(kind);
        if !matches!(known, Some(ExtentKind::Data | ExtentKind::Zero | ExtentKind::Encoded)) {
            return Err(format!("{which} is of kind {kind}, which no source has"));
        }
        if length == 0 {
            return Err(format!("{which}, at guest byte {guest_offset}, is 0 bytes long"));
        }
        let end = guest_offset.checked_add(length).filter(|&end| end <= size);
        let Some(end) = end else {
            return Err(format!(
                "{which}, {length} bytes at guest byte {guest_offset}, passes the end of a disk of {size} bytes"
            ));
        };
        // The first may begin before `from`, in the middle of a run.
        if end <= after || (index > 0 && guest_offset < after) {
            return Err(format!(
                "{which}, {length} bytes at guest byte {guest_offset}, is not behind guest byte {after}"
            ));
        }
        after = end;
    }
    if next < after {
        return Err(format!("it would go on at guest byte {next}, before the end of its last extent at {after}"));
    }
    if next <= from && from < size {
        return Err(format!("it would go on at guest byte {next}, and was asked from {from} on"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(guest_offset: u64, length: u64, kind: u32) -> Extent {
        Extent { guest_offset, length, location: 0, kind, device: 0 }
    }

    #[test]
    fn ascending_known_extents_are_good() {
        assert_eq!(check_extents(&[], 0, 100, 100), Ok(()));
        assert_eq!(check_extents(&[extent(0, 10, 1), extent(10, 5, 2), extent(20, 5, 3)], 0, 25, 25), Ok(()));
        assert_eq!(check_extents(&[extent(0, 10, 1)], 5, 10, 25), Ok(()));
        assert_eq!(check_extents(&[], 25, 25, 25), Ok(()));
    }

    #[test]
    fn each_fault_has_its_words_and_numbers() {
        let bad = |found: &[Extent], from, next, size, why: &str| {
            let text = check_extents(found, from, next, size).err().unwrap_or_default();
            assert!(text.contains(why), "{text:?} lacks {why:?}");
        };
        bad(
            &[extent(0, 10, 1), extent(9, 5, 1)],
            0,
            25,
            25,
            "extent 1 of 2 from guest byte 0 on, 5 bytes at guest byte 9",
        );
        bad(&[extent(0, 5, 1)], 5, 25, 25, "is not behind guest byte 5");
        bad(&[extent(20, 6, 1)], 0, 26, 25, "6 bytes at guest byte 20, passes the end of a disk of 25 bytes");
        bad(&[extent(u64::MAX, 2, 1)], 0, u64::MAX, u64::MAX, "passes the end");
        bad(&[], 5, 5, 25, "go on at guest byte 5, and was asked from 5 on");
        bad(&[extent(0, 0, 1)], 0, 25, 25, "guest byte 0, is 0 bytes long");
        bad(&[extent(0, 1, 4)], 0, 25, 25, "is of kind 4, which no source has");
        bad(&[extent(0, 1, 9)], 0, 25, 25, "is of kind 9");
        bad(&[extent(0, 10, 1)], 0, 9, 25, "before the end of its last extent at 10");
    }
}
