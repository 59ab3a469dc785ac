//! The requested size of an image, and the checks that can refuse it.

use super::SECTOR;
use crate::bytes::Bytes;
use instar_guest_abi::ErrorCode;

/// A virtual size as the operator writes it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This size.
    Exactly(u64),
    /// This much more than now.
    More(u64),
    /// This much less than now.
    Less(u64),
}

impl Default for NewSize {
    fn default() -> Self {
        Self::More(0)
    }
}

/// A reason to refuse a size: the code, and one clause.
pub(super) type Refusal = (ErrorCode, String);

impl NewSize {
    /// Compute the size in bytes that an image of `old` bytes gets. The format counts in units of `unit` bytes, and other sizes
    /// are rounded up, so that naming the same size a second time changes nothing.
    ///
    /// # Errors
    /// An impossible size.
    pub(super) fn of(self, old: u64, unit: u64) -> Result<u64, Refusal> {
        let refused = |clause: String| Err((ErrorCode::BadUsage, clause));
        let size = match self {
            Self::Exactly(size) => Some(size),
            Self::More(bytes) => old.checked_add(bytes),
            Self::Less(bytes) => Some(old.saturating_sub(bytes)),
        };
        let Some(size) = size.filter(|&size| i64::try_from(size).is_ok()) else {
            return refused("cannot have a size of more than 2^63 - 1 bytes".to_owned());
        };
        if size == 0 {
            return refused(format!("has {}: its new size must be positive", Bytes(old)));
        }
        if size % SECTOR != 0 {
            let (lesser, greater) = (size - size % SECTOR, (size - size % SECTOR).saturating_add(SECTOR));
            let or = if lesser == 0 { String::new() } else { format!("{lesser} or ") };
            return refused(format!(
                "cannot have {size} bytes: the new size must be a multiple of {SECTOR}, such as {or}{greater}"
            ));
        }
        let whole = size.checked_next_multiple_of(unit.max(SECTOR)).filter(|&whole| i64::try_from(whole).is_ok());
        Ok(whole.unwrap_or(size))
    }
}

/// What an operator who has not permitted a size below the present one is told.
pub(super) fn shrinks(old: u64, new: u64) -> String {
    format!(
        "has {}, and a shrunken image of {} loses all data past its end: give --shrink if nothing important is there, after its \
         guest has made its file systems and partitions smaller",
        Bytes(old),
        Bytes(new)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_from_what_is_named_and_what_there_is() {
        assert_eq!(NewSize::Exactly(1024).of(512, 512), Ok(1024));
        assert_eq!(NewSize::More(512).of(1024, 512), Ok(1536));
        assert_eq!(NewSize::Less(512).of(1024, 512), Ok(512));
        assert_eq!(NewSize::Exactly(1024).of(1024, 512), Ok(1024));
    }

    #[test]
    fn what_is_named_again_is_the_size_that_it_was_rounded_to() {
        assert_eq!(NewSize::Exactly(5120).of(4096, 4096), Ok(8192));
        assert_eq!(NewSize::Exactly(5120).of(8192, 4096), Ok(8192));
        assert_eq!(NewSize::More(512).of(8192, 4096), Ok(12288));
        assert_eq!(NewSize::Exactly(4096).of(8192, 4096), Ok(4096));
        assert_eq!(NewSize::Exactly(i64::MAX as u64 - 511).of(512, 4096), Ok(i64::MAX as u64 - 511));
    }

    #[test]
    fn what_no_disk_has_is_refused() {
        let refused = |size: NewSize, old, word: &str| {
            let (code, clause) = size.of(old, 512).err().unwrap_or((ErrorCode::NoSpace, String::new()));
            assert!(code == ErrorCode::BadUsage && clause.contains(word), "{clause} lacks {word}");
        };
        refused(NewSize::Exactly(0), 1024, "positive");
        refused(NewSize::Less(1024), 1024, "positive");
        refused(NewSize::Less(u64::MAX), 1024, "positive");
        refused(NewSize::More(u64::MAX), 1024, "2^63");
        refused(NewSize::Exactly(1 << 63), 1024, "2^63");
        refused(NewSize::Exactly(1000), 512, "such as 512 or 1024");
        refused(NewSize::Exactly(1), 512, "such as 512");
    }
}
