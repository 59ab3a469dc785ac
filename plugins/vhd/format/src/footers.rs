//! The two copies of a footer: which of them counts.
//!
//! QEMU reads the one in front, blktap the one at the end and falls back to the one in front. They say the same unless
//! something went wrong: a new block overwrites the footer at the end before there is another one.

use crate::footer::{Footer, Kind, FOOTER_BYTES};
use crate::{FormatError, SECTOR};

/// What the copies say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footers {
    /// The one that counts: that in front, if there is one.
    pub footer: Footer,
    /// The copy in front is there.
    pub head: bool,
    /// Byte offset of the one at the end, if it is there, and whether it is the same as the one that counts.
    pub tail: Option<(u64, bool)>,
}

impl Footers {
    /// Where the footer at the end of a file of `length` bytes begins: in its last 512 bytes, or, as very old versions of
    /// Virtual PC wrote it, in its last 511 (blktap, `vhd_read_short_footer`); `None` for a file that has no room for one.
    #[must_use]
    pub fn tail_offset(length: u64) -> Option<u64> {
        let footer = FOOTER_BYTES as u64;
        let short = length.checked_rem(SECTOR) == Some(SECTOR - 1);
        length.checked_sub(if short { footer - 1 } else { footer })
    }

    /// Choose between the first 512 bytes of a file and the last ones, which begin at `tail_offset`. `None` if neither is a
    /// footer.
    ///
    /// # Errors
    /// When a footer is not understood, or they are of two images.
    pub fn choose(
        front: &[u8; FOOTER_BYTES],
        end: &[u8; FOOTER_BYTES],
        tail_offset: u64,
    ) -> Result<Option<Self>, FormatError> {
        // Where there should be data, a guest may have written a footer that is not understood. The copy in front of a disk
        // with blocks is its own, and has to make sense.
        let (front, end) = match (Footer::parse(front), Footer::parse(end)) {
            (Ok(front), Ok(end)) => (front, end),
            (Ok(front @ Some(_)), Err(_)) => (front, None),
            (Err(_), Ok(Some(end))) if end.kind() == Kind::Fixed => (None, Some(end)),
            (Err(error), _) | (_, Err(error)) => return Err(error),
        };
        let head = front.filter(|footer| footer.kind() != Kind::Fixed && tail_offset > 0);
        let tail = end;
        match (head, tail) {
            // The guest of a fixed disk can make its first sector look like anything; that of a dynamic one whose footer was
            // lost, what is the last sector now. Which of the two it is, nobody can tell.
            (Some(_), Some(tail)) if tail.kind() == Kind::Fixed => Err(FormatError::corrupt(
                "the file ends with the footer of a fixed disk and begins with that of another kind: one of them is a guest's",
            )),
            (Some(head), Some(tail)) if !tail.is_version_of(&head) => Err(FormatError::corrupt(
                "the footer at the end and its copy in front are of two different images: one of them was overwritten",
            )),
            (Some(head), tail) => {
                let tail = tail.map(|tail| (tail_offset, tail == head));
                Ok(Some(Self { footer: head, head: true, tail }))
            }
            (None, Some(footer)) => Ok(Some(Self { footer, head: false, tail: Some((tail_offset, true)) })),
            (None, None) => Ok(None),
        }
    }

    /// Whether both copies are there, and the same.
    #[must_use]
    pub fn are_whole(&self) -> bool {
        let head = self.head || self.footer.kind() == Kind::Fixed;
        head && matches!(self.tail, Some((_, true)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn choose(front: &[u8; FOOTER_BYTES], end: &[u8; FOOTER_BYTES]) -> Result<Option<Footers>, FormatError> {
        Footers::choose(front, end, 4096)
    }

    #[test]
    fn the_copy_in_front_counts() {
        let footer = Footer::new(Kind::Dynamic, 1 << 20, [7; 16], 0);
        let (bytes, none) = (footer.encode(), [0; FOOTER_BYTES]);
        let whole = choose(&bytes, &bytes).unwrap().unwrap();
        assert!(whole.are_whole() && whole.footer == footer);
        let lost = choose(&bytes, &none).unwrap().unwrap();
        assert_eq!((lost.footer, lost.head, lost.tail), (footer, true, None));
        let lost = choose(&none, &bytes).unwrap().unwrap();
        assert_eq!((lost.footer, lost.head, lost.are_whole()), (footer, false, false));
        let grown = footer.with_size(2 << 20);
        let between = choose(&grown.encode(), &bytes).unwrap().unwrap();
        assert_eq!((between.footer, between.tail), (grown, Some((4096, false))));
        assert_eq!(choose(&none, &none), Ok(None));
        // Bytes of a size that are swapped leave the checksum right.
        let nonsense = footer.with_size(0).encode();
        assert!(choose(&nonsense, &bytes).unwrap_err().text.contains("0 sectors"));
        assert_eq!(choose(&bytes, &nonsense).unwrap().unwrap().tail, None);
        let fixed = Footer::new(Kind::Fixed, 4096, [7; 16], 0).encode();
        assert!(choose(&nonsense, &fixed).unwrap().unwrap().are_whole());
        let other = Footer::new(Kind::Dynamic, 1 << 20, [8; 16], 0);
        assert!(choose(&bytes, &other.encode()).unwrap_err().text.contains("two different images"));
    }

    #[test]
    fn what_a_guest_can_write_is_not_believed() {
        let fixed = Footer::new(Kind::Fixed, 4096, [7; 16], 0).encode();
        let forged = Footer::new(Kind::Differencing, 1 << 20, [8; 16], 0).encode();
        assert!(choose(&forged, &fixed).unwrap_err().text.contains("a guest's"));
        let chosen = choose(&fixed, &fixed).unwrap().unwrap();
        assert!(chosen.footer.kind() == Kind::Fixed && chosen.are_whole());
        assert_eq!(choose(&fixed, &[0; 512]), Ok(None), "a fixed disk ends with its footer");
    }

    #[test]
    fn old_footers_are_a_byte_short() {
        assert_eq!(
            [512, 511, 1023, 1024, 1000].map(Footers::tail_offset),
            [Some(0), Some(0), Some(512), Some(512), Some(488)]
        );
        assert_eq!([0, 100, 510].map(Footers::tail_offset), [None; 3]);
    }
}
