//! Which parent an image with a parent goes with, while the parent is written and afterwards.
//!
//! The parent's DataWriteGuid changes with what it holds, and its child is to go with it before and after. For that, a locator
//! has two keys: "the implementation has to first store the new GUID in the parent identifier, and then update the parent's
//! write GUID" (2.6.2.6.3, note 12). Where the second key is missing, or lies so that a power loss could tear it, the child's
//! own FileWriteGuid says the same until the log can change the locator: it has to be a new one anyway before the file is
//! changed (2.2.2), and the GUID that the parent is about to have is new.

use crate::{keys, Guid, Header, Item, Locator, Region, GUID_TEXT_BYTES};

/// Steps from the recorded GUID to the announced one that are looked for: this many commits may have been interrupted,
/// one after the other.
const STEPS: usize = 64;
/// What a disk writes at once, in bytes.
const SECTOR: u64 = 512;
/// What may be changed of an image before its parent is changed, in bytes (`instar_guest_abi::IDENTITY_RANGE`).
const RANGE: u64 = 4096;

/// Where an image says that its parent is about to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// In the parent locator.
    Locator {
        /// Byte offset in the file of the value of `parent_linkage`.
        linkage: u64,
        /// Byte offset in the file of the value of `parent_linkage2`.
        linkage2: u64,
    },
    /// In the FileWriteGuid of its header.
    Header,
}

/// What an image says of its parent's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lineage {
    /// `parent_linkage`: what the parent had when the two were last linked.
    pub linkage: Guid,
    /// What the parent is about to have, or has already.
    pub announced: Option<Guid>,
    /// Where the next announcement goes.
    pub record: Record,
}

/// Whether `later` follows from `earlier` with the DataWriteGuid of the child, in a few steps.
fn follows(earlier: Guid, later: Guid, own: &Guid) -> bool {
    let next = |guid: &Guid| Some(guid.next(&own.0));
    core::iter::successors(next(&earlier), next).take(STEPS).any(|guid| guid == later)
}

impl Lineage {
    /// What header and locator say; `item` is the locator's place in the metadata region.
    #[must_use]
    pub fn of(header: &Header, locator: &Locator, region: &Region, item: Item) -> Self {
        let linkage = locator.linkage;
        let by_locator = locator.linkage2.filter(|guid| *guid == linkage.next(&header.data_write.0));
        let is_announced = |guid: &Guid| by_locator.is_none() && follows(linkage, *guid, &header.data_write);
        let by_header = Some(header.file_write).filter(is_announced);
        let start = region.offset.saturating_add(item.offset.into());
        let place = |key: &str| {
            let text = locator.value(key).filter(|text| usize::from(text.length) == GUID_TEXT_BYTES)?;
            let at = start.saturating_add(text.offset.into());
            let is_whole = at / SECTOR == at.saturating_add(GUID_TEXT_BYTES as u64 - 1) / SECTOR;
            is_whole.then_some(at)
        };
        let record = match (place(keys::LINKAGE), place(keys::LINKAGE2)) {
            // A replay would undo what is written into a locator.
            (Some(first), Some(second))
                if first / RANGE == second / RANGE && by_header.is_none() && !header.is_dirty() =>
            {
                Record::Locator { linkage: first, linkage2: second }
            }
            _ => Record::Header,
        };
        Self { linkage, announced: by_locator.or(by_header), record }
    }

    /// The DataWriteGuid that the parent has; if one was announced, it may still have the one before that.
    #[must_use]
    pub fn parent(&self) -> Guid {
        self.announced.unwrap_or(self.linkage)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use alloc::string::String;
    use alloc::vec;
    use alloc::vec::Vec;

    const REGION: Region = Region { id: crate::ids::METADATA, offset: 2 << 20, length: 1 << 20, required: true };
    const OLD: Guid = Guid([0x55; 16]);
    const OWN: [u8; 16] = [2; 16];

    fn text(guid: Guid) -> String {
        alloc::format!("{{{guid}}}")
    }

    fn of(file_write: Guid, pairs: &[(&str, String)], at: u32, dirty: bool) -> Lineage {
        let item = Locator::encode(pairs).unwrap();
        let log_guid = if dirty { Guid([1; 16]) } else { Guid::NULL };
        let mut header = Header::new(1, file_write, Guid(OWN), 1 << 20, 1 << 20);
        header.log_guid = log_guid;
        let place = Item { offset: at, length: u32::try_from(item.len()).unwrap() };
        Lineage::of(&header, &Locator::parse(&item, 0).unwrap(), &REGION, place)
    }

    fn both(second: Guid) -> Vec<(&'static str, String)> {
        vec![(keys::LINKAGE, text(OLD)), (keys::LINKAGE2, text(second))]
    }

    #[test]
    fn either_place_announces() {
        let (other, next) = (Guid([9; 16]), OLD.next(&OWN));
        let lineage = of(other, &both(Guid::NULL), 65536, false);
        assert_eq!((lineage.parent(), lineage.announced), (OLD, None));
        assert!(
            matches!(lineage.record, Record::Locator { linkage, linkage2 } if linkage < linkage2 && linkage > 2 << 20)
        );
        let lineage = of(other, &both(next), 65536, false);
        assert_eq!((lineage.parent(), lineage.announced), (next, Some(next)));
        // One that does not follow is somebody else's.
        assert_eq!(of(other, &both(other), 65536, false).announced, None);
        let without = [(keys::LINKAGE, text(OLD))];
        assert_eq!(
            of(other, &without, 65536, false),
            Lineage { linkage: OLD, announced: None, record: Record::Header }
        );
        for guid in [next, next.next(&OWN).next(&OWN)] {
            let lineage = of(guid, &without, 65536, false);
            assert_eq!((lineage.parent(), lineage.record), (guid, Record::Header));
            // Once announced there, it goes on there.
            assert_eq!(of(guid, &both(Guid::NULL), 65536, false).record, Record::Header);
        }
    }

    #[test]
    fn what_could_be_torn_or_undone_is_not_written_into_a_locator() {
        let other = Guid([9; 16]);
        let at = |at, dirty| of(other, &both(Guid::NULL), at, dirty).record;
        assert_eq!(at(65536, true), Record::Header);
        let item = Locator::parse(&Locator::encode(&both(Guid::NULL)).unwrap(), 0).unwrap();
        let [first, second] = [keys::LINKAGE, keys::LINKAGE2].map(|key| item.value(key).unwrap().offset);
        for place in [first, second] {
            assert_eq!(at(65536 + 512 - place - 1, false), Record::Header, "over two sectors");
            assert!(matches!(at(65536 + 512 - place, false), Record::Locator { .. }) || place == first);
        }
        assert_eq!(at(65536 + 4096 - second, false), Record::Header, "in two pages");
    }
}
